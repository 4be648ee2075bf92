"""Check the committed prompt sets: reproducible, without duplicates, disjoint, and with right references."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.tasks.contents import content_key
from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS
from harvester.mock_teacher.tasks.rules import solve

PROMPTS = Path(__file__).resolve().parent.parent / "prompts"
NAMES = ("skills-train.jsonl", "skills-held-out.jsonl")
SPLITS = ("train", "held_out", "held_out_phrasing", "held_out_task")


def _rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row for name in NAMES for row in _rows(name)]


def test_the_committed_files_are_what_the_generator_writes(tmp_path: Path):
    command = [sys.executable, str(PROMPTS / "generate.py"), str(tmp_path)]
    stdout = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (PROMPTS / name).read_bytes()
        assert name in stdout


def test_no_prompt_and_no_id_occurs_twice(rows: list[dict[str, Any]]):
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)


def test_counts_are_those_of_the_card(rows: list[dict[str, Any]]):
    card = tomllib.loads((PROMPTS / "skills.toml").read_text(encoding="utf-8"))
    counts = Counter(row["split"] for row in rows)
    assert counts == {split: card["rows"][split] for split in SPLITS}
    assert card["rows"]["held_out_share"] == pytest.approx(1 - counts["train"] / len(rows), abs=1e-4)
    assert card["licence"] == "CC0-1.0"
    spec = importlib.util.spec_from_file_location("generate_prompts", PROMPTS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert card["seed"] == generator.SEED
    assert card["tasks"] == list(generator.TRAIN)


def test_references_are_right_and_rows_say_how_they_were_asked(rows: list[dict[str, Any]]):
    for row in rows:
        solved = solve(row["prompt"])
        assert solved is not None
        assert (solved.answer, solved.task, solved.phrasing) == (
            row["reference"],
            row["task"],
            row["phrasing"],
        )


def test_no_held_out_content_is_trained_on(rows: list[dict[str, Any]]):
    keys: dict[bool, set[tuple[str, ...]]] = {True: set(), False: set()}
    for row in rows:
        solved = solve(row["prompt"])
        assert solved is not None
        keys[row["split"] == "train"].add(content_key(solved.task, solved.slots))
    assert not keys[True] & keys[False]
    assert len(keys[True]) + len(keys[False]) == len(rows)


def test_splits_hold_the_phrasings_they_promise(rows: list[dict[str, Any]]):
    seen: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        seen.setdefault((row["split"], row["task"]), set()).add(row["phrasing"])
    for task, phrasings in PHRASINGS.items():
        if task == DOUBLE:
            assert [split for split in SPLITS if (split, task) in seen] == ["held_out_task"]
            continue
        assert seen["train", task] == seen["held_out", task] == set(phrasings.train)
        assert seen["held_out_phrasing", task] == set(phrasings.held_out)

"""Test prompts that are not asked: planned, listed, saved, and not missed in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.config.overrides import Overrides
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.run import prepare
from harvester.run.planning.plan_result import Plan
from harvester.store.reader import Corpus
from tests.faults.bench import Ended, run_harvest

Mock = Callable[..., RunningMock]
LONG = "Explain to a child why the sky is blue and why sunsets are red, in two short sentences."
PROMPTS = [
    {"id": "a", "prompt": LONG},
    {"id": "b", "prompt": LONG.upper() + "  "},
    {"id": "c", "prompt": LONG.replace("child", "kid")},
    {"id": "d", "prompt": "What is 3 + 4?"},
    {"id": "e", "prompt": "What is 3 + 5?"},
    {"id": "f", "prompt": LONG, "tools": [{"type": "function", "function": {"name": "look"}}]},
]
PRICE = {"price": {"input": 10.0, "output": 30.0}}


def harvest(mock: RunningMock, root: Path, dedupe: str, **tables: dict[str, object]) -> Ended:
    return run_harvest(mock, root, prompts=PROMPTS, prompt_table={"dedupe": dedupe}, teacher=PRICE, **tables)


def listed(store: Path) -> list[dict[str, object]]:
    path = store / "skipped_prompts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(("dedupe", "skipped"), [("off", []), ("exact", ["b"]), ("near", ["b", "c"])])
def test_repeated_prompts_are_not_asked_and_listed(
    mock_teacher: Mock, tmp_path: Path, dedupe: str, skipped: list[str]
) -> None:
    mock = mock_teacher()
    ended = harvest(mock, tmp_path, dedupe)
    assert ended.exit_code == 0
    asked = {sample.prompt_id for sample in Corpus.open(ended.store).samples(["prompt_id"])}
    assert asked == set("abcdef") - set(skipped)
    assert ended.billed["requests"] == len(asked)
    assert [entry["id"] for entry in listed(ended.store)] == skipped
    assert {entry["other_place"] for entry in listed(ended.store)} <= {"p.jsonl:1"}
    assert (f"{len(skipped)} prompts are not asked" in ended.output) == bool(skipped)
    again = harvest(mock, tmp_path, "off")
    assert again.billed["requests"] == len(skipped), "once the setting is off, they are asked"
    assert listed(again.store) == []


def test_a_plan_shows_examples_and_the_money_saved(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    harvest(mock, tmp_path, "off", budget={"tokens": 1})  # nothing is asked
    path = tmp_path / "harvest.toml"
    whole = prepare.look_ahead(path)
    path.write_text(path.read_text().replace('dedupe = "off"', 'dedupe = "near"'))
    plan = prepare.look_ahead(path)
    assert (whole.rows, plan.rows) == (6, 4)
    assert plan.skipped["by_reason"] == {"duplicate": 1, "near_duplicate": 1}
    assert [example["id"] for example in plan.skipped["examples"]] == ["b", "c"]
    assert whole.high_usd == pytest.approx(plan.high_usd + plan.skipped["high_usd"])
    assert whole.low_usd == pytest.approx(plan.low_usd + plan.skipped["low_usd"])
    assert any("2 prompts will not be asked" in line for line in plan.lines())
    assert prepare.prepare(path).rows_total == 4
    harvest(mock, tmp_path, "off")
    path.write_text(path.read_text().replace('dedupe = "off"', 'dedupe = "near"'))
    held = prepare.look_ahead(path)
    assert (held.rows, held.cached, held.skipped["prompts"], held.skipped["high_usd"]) == (4, 4, 2, 0)


def test_equal_requests_save_nothing_twice(mock_teacher: Mock, tmp_path: Path) -> None:
    same = [{"id": "a", "prompt": LONG}, {"id": "b", "prompt": LONG}]
    run_harvest(
        mock_teacher(), tmp_path, prompts=same, prompt_table={"dedupe": "exact"}, budget={"tokens": 1}
    )
    plan = prepare.look_ahead(tmp_path / "harvest.toml")
    assert (plan.rows, plan.duplicates, plan.skipped["prompts"], plan.skipped["rows"]) == (1, 0, 1, 0)


def test_a_watching_run_refuses_to_skip(mock_teacher: Mock, tmp_path: Path) -> None:
    harvest(mock_teacher(), tmp_path, "exact", budget={"tokens": 1})
    with pytest.raises(ConfigError, match="watches its prompts"):
        prepare.prepare(tmp_path / "harvest.toml", Overrides(watch=True))


EVALS = [{"question": "How many legs do three spiders and two ants have together, and why is that so?"}]
LEAKING = [
    {"id": "clean", "prompt": "What is 3 + 4?", "split": "train"},
    {"id": "eval", "prompt": f"{EVALS[0]['question']} Think step by step.", "split": "train"},
    {"id": "held", "prompt": LONG, "split": "test"},
    {"id": "copy", "prompt": LONG.lower(), "split": "train"},
    {"id": "held too", "prompt": EVALS[0]["question"], "split": "test"},
]


def test_prompts_that_repeat_evaluation_texts_are_not_asked(mock_teacher: Mock, tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "spiders.jsonl.txt").write_text("not read")
    (tmp_path / "evals" / "spiders.jsonl").write_text(json.dumps(EVALS[0]) + "\n")
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=LEAKING, budget={"tokens": 1})
    assert any("1 prompts for training ask the same" in note for note in planned(tmp_path).warnings)
    ended = run_harvest(mock, tmp_path, prompts=LEAKING, decontaminate={"sets": ["evals"]})
    assert ended.exit_code == 0
    asked = {sample.prompt_id for sample in Corpus.open(ended.store).samples(["prompt_id"])}
    assert asked == {"clean", "held", "held too"}
    hits = {entry["id"]: (entry["reason"], entry["other_place"]) for entry in listed(ended.store)}
    assert hits == {
        "eval": ("contaminated_overlap", "evals spiders.jsonl:1"),
        "copy": ("contaminated_exact", "held out p.jsonl:3"),
    }
    plan = planned(tmp_path)
    assert plan.skipped["by_reason"] == {"contaminated_exact": 1, "contaminated_overlap": 1}
    assert not any("ask the same" in note for note in plan.warnings)


def planned(root: Path) -> Plan:
    return prepare.look_ahead(root / "harvest.toml")

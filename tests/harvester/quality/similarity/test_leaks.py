"""Test the search for texts of evaluation sets: planted leaks of every kind among clean texts."""

from __future__ import annotations

import json
import random
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.errors import ConfigError
from harvester.quality.similarity import eval_sets
from harvester.quality.similarity.leaks import LeakIndex, LeakKind
from harvester.quality.similarity.settings import DecontaminateSection, EvalSetSection, load_sets

SUBJECTS = ["trains", "rivers", "planets", "bridges", "markets", "engines", "islands", "forests", "clocks"]
VERBS = ["cross", "reach", "leave", "measure", "repair", "describe", "compare", "visit", "follow", "observe"]
ENDS = ["before noon", "after the storm", "in a quiet valley", "on the longest day", "without any help"]


def sentence(rng: random.Random) -> str:
    lists = (SUBJECTS, VERBS, SUBJECTS, ENDS)
    parts = [" ".join([str(rng.randint(2, 99)), *map(rng.choice, lists)]) for _ in range(4)]
    return f"If {parts[0]}, and {parts[1]}, while {parts[2]}, how many {rng.choice(SUBJECTS)} {parts[3]}?"


def leaked(rng: random.Random, text: str, how: LeakKind) -> str:
    """Return a prompt that repeats an evaluation text in one of three ways."""
    if how == LeakKind.EXACT:
        return f"  {text.upper()} "
    if how == LeakKind.OVERLAP:
        return f"Read this carefully and think. {text} Explain each step, then give {sentence(rng)}"
    words = text.split()
    return " ".join([*words[: len(words) // 2], "really", *words[len(words) // 2 :]]).replace(",", ";", 1)


def test_planted_leaks_are_found_and_clean_prompts_are_not() -> None:
    rng = random.Random(1)
    evals = [sentence(rng) for _ in range(300)]
    kinds = list(LeakKind)
    planted = [(number, kinds[number % 3]) for number in rng.sample(range(300), 150)]
    with closing(LeakIndex()) as index:
        for number, text in enumerate(evals):
            index.add(text, str(number))
        leaks = [index.find([leaked(rng, evals[number], kind)]) for number, kind in planted]
        clean = [index.find([sentence(rng)]) for _ in range(600)]
    hits = [
        leak is not None and leak.label == str(number)
        for leak, (number, _) in zip(leaks, planted, strict=True)
    ]
    recall = sum(hits) / len(hits)
    precision = sum(hits) / (sum(leak is not None for leak in [*leaks, *clean]))
    assert (recall, precision) == (1.0, 1.0)
    found = {leak.kind for leak in leaks if leak is not None}
    assert found >= {LeakKind.EXACT, LeakKind.OVERLAP}


def test_a_change_that_breaks_every_run_is_a_fuzzy_hit() -> None:
    text = "why do cats land on their feet when they fall from a tall tree or a high roof at night"
    words = text.split()
    words[9] = "drop"
    with closing(LeakIndex(similarity=0.6)) as index:
        index.add(text, "cats")
        leak = index.find([" ".join(words)])
        assert leak is not None
        assert (leak.kind, leak.label) == (LeakKind.FUZZY, "cats")
        assert index.find(["why do dogs bark at night when they hear a stranger on the road nearby"]) is None


def test_short_texts_are_hit_as_a_whole_or_when_equal() -> None:
    with closing(LeakIndex()) as index:
        index.add("What is the capital of the republic of Ghana?", "nine words")
        index.add("Who was Ada?", "three words")
        assert index.find(["Tell me: what is the capital of the republic of ghana, in a word"]) is not None
        assert index.find(["who was ada?"]) is not None
        assert index.find(["Tell me who was Ada Lovelace, and what did she write?"]) is None


def test_the_share_of_common_runs_decides() -> None:
    rng = random.Random(3)
    text, other = sentence(rng), sentence(rng)
    half = " ".join([*text.split()[:16], *other.split()])
    for overlap, is_hit in ((0.0, True), (0.9, False)):
        with closing(LeakIndex(overlap=overlap)) as index:
            index.add(text, "a")
            assert (index.find([half]) is not None) == is_hit


def test_sets_are_read_from_json_lines_parquet_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "evals"
    (folder / "deep").mkdir(parents=True)
    rows = [
        {"id": "abc", "question": "How deep is the sea?", "answer": "Deep."},
        {"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello"}]},
        {"id": "x", "label": "kept"},
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.table({"prompt": ["Why?"], "n": [1]}), folder / "deep" / "b.parquet")
    (folder / "c.json").write_text(json.dumps(["one text", {"text": "two"}]))
    (folder / "notes.txt").write_text("not read")
    texts = [(entry.text, entry.place) for entry in eval_sets.read(folder)]
    assert texts == [
        ("How deep is the sea?", "a.jsonl:1"),
        ("Hi there", "a.jsonl:2"),
        ("x", "a.jsonl:3"),
        ("kept", "a.jsonl:3"),
        ("one text", "c.json:1"),
        ("two", "c.json:2"),
        ("Why?", "b.parquet:1"),
    ]
    assert [entry.text for entry in eval_sets.read(folder / "a.jsonl", ["answer"])] == ["Deep."]
    section = DecontaminateSection(sets=("evals", EvalSetSection(path="evals/a.jsonl", fields=("answer",))))
    index, described = load_sets(section, tmp_path)
    with closing(index):
        assert len(index) == 8
    assert [entry["file"] for entry in described] == ["a.jsonl", "c.json", "b.parquet", "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "holds no evaluation set"),
        ("a.jsonl", "{broken", r"a\.jsonl:1.*is no JSON"),
        ("a.jsonl", "[1]", "a row is a JSON object"),
        ("a.jsonl", '{"n": 1}', "has no text"),
        ("a.parquet", "text", "can't be read as Parquet"),
    ],
)
def test_a_set_that_can_not_be_read_is_named(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_sets(DecontaminateSection(sets=(name,)), tmp_path)

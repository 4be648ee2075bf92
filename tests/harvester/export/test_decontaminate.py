"""Test that rows for training that repeat evaluation texts are dropped, listed and named on the cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harvester.export import curate, export
from harvester.export.cards.curation import curation_lines
from harvester.mock_teacher.running import RunningMock
from harvester.similarity.settings import DecontaminateSection
from harvester.store.reader import Corpus
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]
EVAL = "How many legs do three spiders and two ants have together, and why is that so?"
LONG = "Explain to a child why the sky is blue and why sunsets are red, in two short sentences."
PROMPTS = [
    {"id": "clean", "prompt": "What is 3 + 4?", "split": "train"},
    {"id": "eval", "prompt": f"{EVAL} Think step by step.", "split": "train"},
    {"id": "held", "prompt": LONG, "split": "test"},
    {"id": "copy", "prompt": LONG.lower(), "split": "train"},
]


def test_leaks_are_dropped_listed_and_named_on_the_card(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    store = run_harvest(mock, tmp_path, prompts=PROMPTS).store
    assert curation_lines(store) == ()
    (tmp_path / "evals.jsonl").write_text(json.dumps({"question": EVAL}) + "\n")
    path = tmp_path / "curate.toml"
    path.write_text('corpus = "store"\nout = "clean"\n[decontaminate]\nsets = ["evals.jsonl"]\n')
    counts = curate.curate(curate.load(path))
    expected = {"contaminated_exact": 1, "contaminated_overlap": 1}
    assert (counts.kept, dict(counts.dropped)) == (2, expected)
    clean = tmp_path / "clean"
    assert {sample.prompt_id for sample in Corpus.open(clean).samples(["prompt_id"])} == {"clean", "held"}
    hits = [json.loads(line) for line in (clean / "contamination.jsonl").read_text().splitlines()]
    assert {hit["prompt_id"]: hit["hit"] for hit in hits} == {
        "eval": "evals.jsonl evals.jsonl:1",
        "copy": "held out held",
    }
    assert json.loads((clean / "curation.json").read_text())["decontamination"]["held_out_texts"] == 1

    exported = export.export(clean, tmp_path / "out")
    assert exported.rows == 2
    section = DecontaminateSection(sets=(str(tmp_path / "evals.jsonl"),))
    choice = export.RowChoice(decontaminate=section)
    again = export.export(store, tmp_path / "out2", choice=choice)
    assert (again.rows, dict(again.left_out)) == (2, expected)
    assert len((tmp_path / "out2" / "contamination.jsonl").read_text().splitlines()) == 2
    only = {"files": ["p.jsonl"]}
    run_harvest(mock, tmp_path, prompts=PROMPTS, prompt_table=only, decontaminate={"sets": ["evals.jsonl"]})
    (line,) = curation_lines(store)
    assert line == "1 of 2 runs did not ask prompts for training that repeat held-out prompts, evals.jsonl."
    for folder in ("out", "out2"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "Decontaminated against" in card
        assert "1 exact, 1 overlap" in card

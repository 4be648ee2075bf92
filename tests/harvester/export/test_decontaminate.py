"""Test that rows for training that repeat evaluation texts are dropped, listed and named on the cards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harvester.export import curate, export
from harvester.export.cards.curation import curation_lines
from harvester.mock_teacher.running import RunningMock
from harvester.quality.held_out import is_drawn, prompt_key
from harvester.quality.similarity.settings import DecontaminateSection
from harvester.store.reader import Corpus
from tests.faults.bench import run_harvest
from trainer.config import load as load_training
from trainer.data import dataset

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


def drawn_and_other(share: float) -> tuple[str, str]:
    """Return a question that a training draws for evaluation, and one nearly the same that it learns."""
    for number in range(1000):
        text = f"{LONG} Take the voice of a {'very ' * (number % 40)}kind aunt{'!' * (number // 40)}"
        near = f"{text} please"
        keys = [prompt_key([{"role": "user", "content": each}]) for each in (text, near)]
        if is_drawn(keys[0], share) and not is_drawn(keys[1], share):
            return text, near
    raise AssertionError("no question is drawn")


def test_prompts_that_a_training_draws_for_evaluation_are_known_before_and_after_asking(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    drawn, near = drawn_and_other(0.1)
    prompts = [{"id": "drawn", "prompt": drawn}, {"id": "near", "prompt": near}, PROMPTS[0]]
    store = run_harvest(mock_teacher(), tmp_path, prompts=prompts).store
    path = tmp_path / "curate.toml"
    table = 'corpus = "store"\nout = "{out}"\n[decontaminate]\neval_share = {share}\n'
    kept = {}
    for out, share in (("alike", 0.1), ("none", 0.0)):
        path.write_text(table.format(out=out, share=share))
        curate.curate(curate.load(path))
        rows = Corpus.open(tmp_path / out).samples(["prompt_id"])
        kept[out] = {sample.prompt_id for sample in rows}
    assert kept == {"alike": {"clean", "drawn"}, "none": {"clean", "drawn", "near"}}
    record = json.loads((tmp_path / "alike" / "curation.json").read_text())["decontamination"]
    assert (record["eval_share"], record["drawn_prompts"], record["held_out_texts"]) == (0.1, 1, 1)
    # A drawn prompt that repeats an evaluation set is dropped all the same: another training may learn it.
    (tmp_path / "evals.jsonl").write_text(json.dumps({"question": drawn}) + "\n")
    choice = export.RowChoice(decontaminate=DecontaminateSection(sets=(str(tmp_path / "evals.jsonl"),)))
    exported = export.export(store, tmp_path / "out", choice=choice)
    assert (exported.rows, exported.left_out["contaminated_exact"]) == (1, 1)
    # Before asking, the same rule skips the same prompt.
    other = tmp_path / "other"
    other.mkdir()
    run = run_harvest(mock_teacher(), other, prompts=prompts, decontaminate={"eval_share": 0.1})
    asked = {sample.prompt_id for sample in Corpus.open(run.store).samples(["prompt_id"])}
    assert asked == {"drawn", "clean"}
    # A training that holds out more than was known says so; one that holds out less does not.
    (tmp_path / "base").mkdir()
    lines = {}
    for share in (0.05, 0.3):
        (tmp_path / "train.toml").write_text(
            f'[student]\nbase = "base"\n[data]\ncorpus = "alike"\neval_share = {share}\n'
        )
        config = load_training(tmp_path / "train.toml")
        lines[share] = [line for line in dataset.read(config).mixed if "decontaminated" in line]
    assert lines[0.05] == []
    assert "eval_share = 0.3 in curate.toml" in lines[0.3][0]

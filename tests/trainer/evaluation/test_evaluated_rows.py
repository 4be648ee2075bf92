"""Test that an evaluation from the token store says what one in memory says, and tokenises nothing again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from tests.trainer.data.test_token_store import TRAIN, mixed_rows, write_shards
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.tokens import builder, corpus_rows
from trainer.errors import DataError
from trainer.evaluation import evaluate, evaluated_rows
from trainer.evaluation.judging import teacher_pass, verifiers_of
from trainer.evaluation.text_scores import repeats
from trainer.model import model
from trainer.training.inputs import read_inputs


def never_read(*_: object, **__: object) -> None:
    raise AssertionError("the whole corpus was read into memory")


def several_answers() -> list[object]:
    """Rows of every kind; held-out prompts with several answers, equal ones and unusable ones."""
    rows = mixed_rows()
    held = [row for row in rows if "held_out" in row.metadata_json]
    again = [
        replace(row, key=f"{500 + n:064x}", sample_index=1, completion=f"It is {row.reference}")
        for n, row in enumerate(held)
    ]
    broken = replace(held[0], key=f"{600:064x}", sample_index=2, completion=None, outcome="empty")
    tagged = [replace(row, tags=["a", "b"][: n % 3]) for n, row in enumerate(held)]
    return [*again, *(row for row in rows if row not in held), broken, *tagged, *other_contents(held)]


def other_contents(held: list[Any]) -> list[Any]:
    """Prompts with the ids of others: asked under another system prompt, or of another file of prompts."""
    system = {"role": "system", "content": "Be brief."}
    briefly = [
        replace(row, key=f"{800 + n:064x}", messages=[system, *row.messages], completion=f"{n}")
        for n, row in enumerate(held[:3])
    ]
    other = tiny.sample(850, "backwards: of another file", "x", metadata_json=held[0].metadata_json)
    return [*briefly, replace(other, prompt_id=held[0].prompt_id)]


def test_a_scorecard_from_the_store_equals_one_made_in_memory(learned, tmp_path, monkeypatch):
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "copy")
    toml = tmp_path / "copy" / "train.toml"
    toml.write_text(f"{toml.read_text()}[evaluate]\nspeed_prompts = 0\nresamples = 50\n")
    shutil.rmtree(toml.parent / "store")
    rows = several_answers()
    write_shards(toml.parent / "store", rows[20:], rows[:20])
    config = settings.load(toml)

    def results() -> dict[str, str]:
        names = ("scorecard.json", "answers.jsonl", evaluate.EXPLORER_FILE)
        return {name: (config.out_path / name).read_text() for name in names}

    evaluate.evaluate(config)
    expected = results()
    assert len(expected["answers.jsonl"].splitlines()) > 6
    assert "similarity" in expected[evaluate.EXPLORER_FILE]
    assert json.loads(expected["scorecard.json"])["agreement"]["metrics"]["exact"]["repeat"]
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    read_inputs(config, rehearses=False)  # as a training does
    monkeypatch.setattr(dataset, "read", never_read)
    for name in expected:
        (config.out_path / name).unlink()
    progress: list[tuple[int, int, str]] = []
    evaluate.evaluate(config, on_progress=lambda *step: progress.append(step))
    assert results() == expected
    assert not progress, "what the training tokenised is found"


@pytest.mark.parametrize("reasoning", ["drop", "inline", "keep"])
def test_without_held_out_answers_the_longest_learned_one_decides_the_limit(tmp_path, monkeypatch, reasoning):
    rows = [
        *(tiny.sample(n, f"q{n}", "x" * n, reasoning=n % 2 * "so " or None, **TRAIN) for n in range(60, 80)),
        tiny.sample(90, "held", None, outcome="empty", metadata_json='{"split": "held_out"}'),
    ]
    path = tiny.train_toml(tmp_path, rows, data={"reasoning": reasoning})
    tiny.base(tmp_path / "base", speech=SHAPES["qwen-3"].tokenizer())
    config = settings.load(path)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    found = []
    for stored_rows in (1 << 40, 0):
        monkeypatch.setattr(dataset, "STORED_ROWS", stored_rows)
        read = evaluated_rows.read(config, renderer)
        assert not read.targets
        limit = evaluate.answer_limit(config, read.held_out, read.taught, renderer)
        found.append((sorted(read.taught()), limit, [h.prompt_id for h in read.held_out]))
    assert found[0] == found[1]
    assert found[0][1] > evaluate.MIN_NEW_TOKENS


def test_prompts_of_one_id_are_held_out_each_with_its_own_answers(tmp_path):
    rows = tiny.skill(20, held_out=6)
    repeated = [replace(row, key=f"{500 + n:064x}", sample_index=1) for n, row in enumerate(rows[20:])]
    others = other_contents(rows[20:])
    config = settings.load(tiny.train_toml(tmp_path, [*rows, *repeated, *others]))
    held_out = dataset.read(config).held_out
    asked = {
        json.dumps([dict(m) for m in held.conversation.messages]): [c.text for c in held.candidates]
        for held in held_out
    }
    expected = {json.dumps(row.messages): [row.completion] for row in others}
    expected |= {json.dumps(row.messages): [row.completion] * 2 for row in rows[20:]}
    assert asked == expected
    assert len(held_out) == 10
    tally = teacher_pass(held_out, "held_out", verifiers_of(config, held_out))["reverse"]
    assert tally["prompts"] == 10
    assert set(repeats(held_out)) == {None, *(row.completion for row in rows[20:])}


@pytest.mark.parametrize("few_rows", [0, 1000])
def test_held_out_prompts_of_a_store_are_those_in_memory(tmp_path, monkeypatch, few_rows):
    rows = several_answers()
    odd = replace(rows[0], key=f"{700:064x}", prompt_id="odd", completion="\x00 \u2028 \U0001f600")
    config = settings.load(tiny.train_toml(tmp_path, [*rows, odd]))
    expected = dataset.read(config, learns=False).held_out
    assert {len(held.candidates) for held in expected} == {1, 2, 3}
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr(corpus_rows, "_FEW_ROWS", few_rows)
    stored = evaluated_rows.read_held_out(
        config, Renderer(model.load_tokenizer(config.base, config.template))
    )
    assert tuple(stored) == expected
    assert (stored[-1], stored[1:3]) == (expected[-1], list(expected[1:3]))


def test_a_corpus_that_changes_under_an_evaluation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    rows = tiny.skill(20, held_out=4)
    config = settings.load(tiny.train_toml(tmp_path, rows))
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    stored = builder.prepare(config, renderer).rows
    tiny.corpus(tmp_path / "store", rows[1:])
    with pytest.raises(DataError, match="1 rows of the corpus went"):
        list(corpus_rows.read_samples(config, stored.reader, np.arange(24, dtype=np.uint32)))
    tiny.corpus(tmp_path / "store", [*rows[:20], replace(rows[20], metadata_json="{}"), *rows[21:]])
    with pytest.raises(DataError, match="not those that were tokenised"):
        corpus_rows.held_out_prompts(config, stored, tmp_path)
    assert Path(config.cache).is_dir()

"""Test that an experiment knows a large corpus by the hashes of a small one, and holds none of its rows."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.data.test_token_store import TRAIN, write_shards
from tests.trainer.evaluation.test_evaluated_rows import never_read, several_answers
from trainer import config as settings
from trainer.data import answers, dataset
from trainer.data.tokens import corpus_rows
from trainer.errors import DataError
from trainer.experiments.stages import Stages, headline_split
from trainer.experiments.taught_store import trainings_of_store
from trainer.experiments.trainings import NO_DISPLAY, digest, held_out_sha256, rows_sha256


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"answers": "majority", "weights": "agreement"},
        {"per_prompt": 1},
        {"weights": "prompt", "truncated": "unterminated", "reasoning": "inline"},
    ],
    ids=lambda data: ",".join(data) or "default",
)
def test_rows_and_held_out_prompts_of_a_store_have_the_hashes_of_those_in_memory(
    data: dict[str, Any], tmp_path, monkeypatch
):
    rows = several_answers()
    again = [
        replace(row, key=f"{700 + n:064x}", sample_index=3, completion=f"{row.completion} é\U0001f600 {n}")
        for n, row in enumerate(rows[30:40])
        if row.completion
    ]
    held = tiny.sample(900, "zz", "held", metadata_json='{"split": "held_out"}')
    path = tiny.train_toml(tmp_path, [], data=data)
    write_shards(tmp_path / "store", [*again, *rows[20:]], [held, *rows[:20]])
    config = settings.load(path)
    require_equal_hashes(config, monkeypatch)


def test_a_single_row_has_the_hash_of_one_in_memory(tmp_path, monkeypatch):
    held = tiny.sample(900, "zz", "held", metadata_json='{"split": "held_out"}')
    path = tiny.train_toml(tmp_path, [tiny.sample(1, "a", "b", **TRAIN), held], data={"weights": "prompt"})
    require_equal_hashes(settings.load(path), monkeypatch)


def require_equal_hashes(config: settings.TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read = dataset.read(config)
    expected = rows_sha256(read), held_out_sha256(headline_split(read.held_out))
    assert expected[1] == digest([asdict(held) for held in headline_split(read.held_out)])
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    monkeypatch.setattr(corpus_rows, "_FEW_ROWS", 3)
    monkeypatch.setattr(dataset, "read", never_read)
    work = config.root / "work"
    _, taught = trainings_of_store(config, work, NO_DISPLAY)
    assert (taught.sha256(), taught.held_out_sha256()) == expected
    assert taught.store.rows.learned == len(read.train)
    assert not list(work.iterdir()), "the sorted texts are gone"


def test_a_large_corpus_without_held_out_prompts_is_refused(tmp_path):
    path = tiny.train_toml(tmp_path, tiny.skill(12), data={"eval_share": 0.0})
    with pytest.raises(DataError, match="no prompt is held out to score students with"):
        trainings_of_store(settings.load(path), tmp_path / "work", NO_DISPLAY)


def test_students_of_another_precision_or_tokenizer_are_trained_and_scored_anew(tmp_path):
    """They have one base and template, and had one key: each was taken for the other."""
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(6, held_out=2)))
    rows = dataset.read(config)
    in_4_bits = config.model_copy(update={"student": config.student.model_copy(update={"quantise": "nf4"})})

    def keys(each: settings.TrainConfig) -> tuple[str, str]:
        stages = Stages(each, tmp_path / "curve", rows, "accuracy")
        return stages.training_key(rows, 0), digest(stages._judging)

    found = [keys(config), keys(in_4_bits)]
    assert keys(config) == found[0]
    tokenizer = tmp_path / "base" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    found.append(keys(config))
    assert [len(set(each)) for each in zip(*found, strict=True)] == [3, 3]


@pytest.mark.parametrize("weights", ["row", "prompt", "agreement"])
def test_a_training_is_known_by_how_prompts_share_their_weight(tmp_path, monkeypatch, weights):
    """The shares depend on which answers are too long, so the hash of the rows tells nothing of them."""
    path = tiny.train_toml(tmp_path, tiny.skill(8, held_out=2), data={"weights": weights})
    config = settings.load(path)
    rows = dataset.read(config)
    trainings = Stages(config, tmp_path / "curve", rows, "loss")
    before = trainings.training_key(rows, 0)
    assert trainings.training_key(rows, 0) == before
    monkeypatch.setattr(answers, "_SHARED_BY_PROMPT", 1)
    assert (trainings.training_key(rows, 0) != before) == (weights == "prompt")

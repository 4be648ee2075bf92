"""Test that some rows of a corpus are read as if the others were not there, and that these are not held."""

from __future__ import annotations

import random

import pytest

from harvester.quality.held_out import prompt_key
from tests.trainer import tiny
from tests.trainer.data.test_token_store import mixed_rows, write_shards
from trainer import config as settings
from trainer.data import dataset, row_rules


@pytest.mark.parametrize("seed", range(4))
def test_a_subset_is_read_as_a_corpus_of_its_own(tmp_path, seed):
    data = {"answers": "majority", "weights": "agreement"} if seed % 2 else {"weights": "prompt"}
    config = settings.load(tiny.train_toml(tmp_path, [], data=data))
    rows = mixed_rows()
    random.Random(seed).shuffle(rows)
    split = {row.key: row_rules.split_of(row, prompt_key(row.messages), config.data) for row in rows}
    held_out = {key for key in split if split[key] != "train"}
    train = sorted(split.keys() - held_out)
    only = set(random.Random(seed).sample(train, len(train) // 2))
    write_shards(tmp_path / "store", rows[:20], rows[20:])
    found = dataset.read(config, only)
    kept = [row for row in rows if row.key in only | held_out]
    for path in (tmp_path / "store" / "shards").iterdir():
        path.unlink()
    write_shards(tmp_path / "store", kept)
    wanted = dataset.read(config)
    assert (found.train, found.weights, found.held_out) == (wanted.train, wanted.weights, wanted.held_out)
    assert list(found.leaves()) == list(wanted.leaves())
    assert found.excluded == wanted.excluded
    assert set(found.origins) <= only | held_out, "rows beyond the subset are not held"

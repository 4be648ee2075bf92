"""Test that rows which a misspelt split holds out are named with their number."""

from __future__ import annotations

import json

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer.data import dataset
from trainer.data.split_names import UnknownSplits

MISSPELT = (
    "3 rows are held out by a split of an unusual name: 'Train' (2 rows), 'tr\\x1bian' (1 row); "
    "only split = 'train' is learned"
)


def row(number: int, split: str, **more):
    metadata = json.dumps({"split": split})
    return tiny.sample(number, f"say {number}", "yes", metadata_json=metadata, **more)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("command", ["doctor", "plan", "train"])
def test_misspelt_splits_are_named_with_their_rows(tmp_path, monkeypatch, run_trainer, command, stored):  # noqa: F811
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 0)
        monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    usual = [row(100 + n, name) for n, name in enumerate(["Test", "validation_matched", "dev", "held_out"])]
    odd = [row(200, "Train"), row(201, "tr\x1bian"), row(202, "Train")]
    path = tiny.train_toml(tmp_path, [*tiny.skill(24), *usual, *odd])
    code, out, err = run_trainer(command, path)
    assert code == 0, err
    assert MISSPELT in " ".join((out + err).split())
    tiny.corpus(tmp_path / "store", [*tiny.skill(24), *usual])
    code, out, err = run_trainer("plan", path)
    assert (code, "unusual name" in out + err) == (0, False)


def test_few_names_are_held_and_shown_of_a_field_that_is_no_split():
    counted = UnknownSplits("split")
    counted.add(row(0, "trian", purpose="eval"))  # is held out whatever its split
    for number in range(1000):
        counted.add(row(number, f"{'x' * 100}{number}"))
    assert len(counted.counts) == 101
    added = UnknownSplits("split")
    added.add_counts(counted.counts)
    [note] = added.notes()
    assert note.startswith("1,000 rows are held out")
    assert "and 97 more; only" in note
    assert len(note) < 400

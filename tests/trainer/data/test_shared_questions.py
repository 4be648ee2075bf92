"""Test that questions which are learned and held out under different system prompts are counted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data import dataset
from trainer.data.row_rules import split_of
from trainer.data.shared_questions import count, question_of
from trainer.training.inputs import read_inputs

MANNERS = ("Be brief.", "Explain each step.", "")


def rows():
    """40 questions under three system prompts, whose splits are drawn."""
    made = []
    for number, (manner, row) in enumerate(itertools.product(MANNERS, tiny.skill(40))):
        system = [{"role": "system", "content": manner}] if manner else []
        made.append(
            replace(
                row,
                key=f"{number:064x}",
                prompt_id=f"{row.prompt_id} {manner}",
                messages=[*system, *row.messages],
                metadata_json="{}",
            )
        )
    return made


@pytest.mark.parametrize("stored", [False, True])
def test_a_question_that_is_learned_and_held_out_is_counted(tmp_path, monkeypatch, stored):
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    config = settings.load(tiny.train_toml(tmp_path, rows(), data={"eval_share": 0.2}))
    splits = {
        row.key: split_of(row, dataset.prompt_key(row.messages), config.data) == "train" for row in rows()
    }
    held_out = {row.messages[-1]["content"] for row in rows() if not splits[row.key]}
    expected = sum(splits[row.key] and row.messages[-1]["content"] in held_out for row in rows())
    assert expected > 5
    notes = [note for note in read_inputs(config, rehearses=False).rows.mixed if "question" in note]
    assert [note.partition(" to learn")[0] for note in notes] == [
        f"{expected} of {sum(splits.values())} rows"
    ]


def test_it_is_said_before_the_training(run_trainer, tmp_path):  # noqa: F811
    toml = tiny.train_toml(tmp_path, rows(), data={"eval_share": 0.2})
    for verb in ("doctor", "plan"):
        code, out, err = run_trainer(verb, toml)
        assert code == 0
        assert "ask the question of a held-out prompt under another system prompt" in out + err


def test_other_questions_and_prompts_without_one_are_not_counted():
    system, user = {"role": "system", "content": "a"}, {"role": "user", "content": "What?"}
    assert question_of([system]) == ""
    assert question_of([system, user]) == question_of([{**user, "content": " what? "}])
    assert count([[system, user]], [[user]]) == 1
    assert count([[user], [system, user]], [[user, user], [system]]) == 0
    assert count([[{**user, "content": "WHAT?"}]], [[user]]) == 0  # a held-out prompt in another spelling

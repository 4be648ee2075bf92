"""Check that `plan` and `doctor` refuse, before hours are spent, what `train` refuses, in the same words."""

from __future__ import annotations

import sys

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture

NO_HELD_OUT = "no held-out answer to evaluate with during the training"
NO_PROMPT = "no held-out prompt to sample answers to during the training"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"evaluate": {"every": 1}}, NO_HELD_OUT),
        ({"evaluate": {"every": "20%"}}, NO_HELD_OUT),
        ({"evaluate": {"sample_every": 5}}, NO_PROMPT),
        ({"train": {"trackers": ["mlflow"]}}, "mlflow"),
    ],
)
def test_what_train_refuses_plan_and_doctor_refuse_too(
    tmp_path,
    run_trainer,  # noqa: F811
    monkeypatch,
    sections,
    words,
):
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    toml = tiny.train_toml(tmp_path, tiny.skill(8), **sections)
    toml.write_text(toml.read_text().replace("[data]\n", "[data]\neval_share = 0.0\n"))
    told = {}
    for verb in ("doctor", "plan", "train"):
        code, out, err = run_trainer(verb, toml)
        assert code == (1 if verb == "doctor" else 2), err
        told[verb] = out + err
    for text in told.values():
        assert words in text
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_plan_says_that_train_will_not_go_on_under_other_settings(tmp_path, run_trainer):  # noqa: F811
    toml = tiny.train_toml(tmp_path, tiny.skill(8))
    code, out, err = run_trainer("train", toml)
    assert code == 0, err
    code, out, _ = run_trainer("plan", toml, "--probe", 0)
    assert "other settings" not in out
    toml.write_text(toml.read_text().replace("lr = 0.01", "lr = 0.02"))
    code, out, _ = run_trainer("plan", toml, "--probe", 0)
    assert code == 0
    assert "which had other settings: train.lr 0.01 -> 0.02" in out
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert "train.lr 0.01 -> 0.02" in err


def test_a_full_student_can_be_planned(tmp_path, run_trainer):  # noqa: F811
    toml = tiny.train_toml(tmp_path, tiny.skill(8), train={"method": "full"})
    toml.write_text(toml.read_text().replace("[lora]\nrank = 4\nalpha = 8\n", ""))
    for verb in ("plan", "doctor"):
        code, _, err = run_trainer(verb, toml)
        assert code == 0, err

"""Sampled answers during a training: the same bits with and without them, also after a kill."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from harvester.observe.report import scorecard
from tests.trainer import tiny
from tests.trainer.command_line import lines, run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.errors import DataError
from trainer.training.reporter import Callbacks
from trainer.training.train import train

# Dropout draws random numbers in every forward pass, so that a draw by a sample would show.
SHAPE = {"epochs": 2, "log_every": 1, "save_every": 2, "pack_tokens": 128}
SAMPLES = {"sample_every": 1, "sample_answers": 3, "max_new_tokens": 12}


def toml_of(folder, **evaluate):
    return tiny.train_toml(
        folder, tiny.skill(40, held_out=8), train=SHAPE, lora={"dropout": 0.25}, evaluate=evaluate
    )


def adapter_of(config) -> dict[str, torch.Tensor]:
    return load_file(config.out_path / "adapter" / "adapter_model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_samples_change_no_bit_also_across_a_kill(tmp_path, fork_server):
    plain = settings.load(toml_of(tmp_path / "plain"))
    whole = train(plain)
    state = torch.get_rng_state()
    sampled = settings.load(toml_of(tmp_path / "sampled", **SAMPLES))
    logs = []
    train(sampled, Callbacks(on_samples=logs.append))
    assert [log.step for log in logs] == list(range(1, whole.steps + 1))
    assert {len(log.answers) for log in logs} == {3}
    assert same(adapter_of(plain), adapter_of(sampled))
    assert torch.equal(state, torch.get_rng_state())  # as the run without samples left it

    toml = toml_of(tmp_path / "killed", **SAMPLES)
    killed = fork_server("command", words=["train", toml], env={"HARVESTER_FAILPOINT": "train.update:4"})
    assert killed["signal"] == 9, killed["err"]
    log = [line for line in lines(tmp_path / "killed/out/train.jsonl") if "answers" in line]
    assert [line["step"] for line in log] == [1, 2, 3]
    resumed = fork_server("command", words=["train", toml])
    assert resumed["code"] == 0, resumed["err"]
    assert "resumed at step 2" in resumed["err"]
    assert same(adapter_of(plain), adapter_of(settings.load(toml)))
    log = [line for line in lines(tmp_path / "killed/out/train.jsonl") if "answers" in line]
    assert [line["step"] for line in log] == list(range(1, whole.steps + 1))
    assert [line["answers"] for line in log] == [list(log.answers) for log in logs]


def test_a_sample_has_prompt_answer_and_teacher_and_the_report_reads_the_log(run_trainer, tmp_path):  # noqa: F811
    toml = toml_of(tmp_path, **{**SAMPLES, "sample_every": "50%"})
    code, _, err = run_trainer("train", toml)
    assert code == 0, err
    path = tmp_path / "out" / "train.jsonl"
    samples = [line for line in lines(path) if "answers" in line]
    steps = samples[0]["steps"]
    assert [line["step"] for line in samples] == [steps // 2, steps]
    [first, *_] = samples[0]["answers"]
    assert first["prompt"].startswith("backwards: ")
    assert first["teacher"] == first["prompt"].removeprefix("backwards: ")[::-1]
    assert f"{first['prompt_id']}: student " in err
    assert len(scorecard.read_training(path)) == steps


def test_at_an_evaluation_there_is_one_sample(tmp_path):
    config = settings.load(toml_of(tmp_path, **{**SAMPLES, "every": 2}))
    samples, evaluations = [], []
    done = train(config, Callbacks(on_samples=samples.append, on_evaluation=evaluations.append))
    steps = {log.step for log in samples} | {log.step for log in evaluations}
    assert len(samples) + len(evaluations) == len(steps) == done.steps


def test_nothing_held_out_is_refused_by_name(tmp_path):
    toml = tiny.train_toml(
        tmp_path, tiny.skill(20), data={"eval_share": 0.0}, evaluate={"sample_every": "10%"}
    )
    with pytest.raises(DataError, match="no held-out prompt") as refused:
        train(settings.load(toml))
    assert refused.value.place == "evaluate.sample_every"


def test_the_setting_is_free_and_unknown_to_earlier_trainings(tmp_path):
    config = settings.load(toml_of(tmp_path))
    assert "sample_every" not in config.model_dump()["evaluate"]
    train(config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 1})}))
    changed = settings.load(toml_of(tmp_path, **SAMPLES))
    again = train(changed.model_copy(update={"train": changed.train.model_copy(update={"max_steps": 1})}))
    assert again.steps_now == 0  # resumed, not refused

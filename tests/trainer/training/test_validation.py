"""Evaluation during the training: held-out loss, the best adapter, patience, log, page, and the same bits."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from harvester.observe.report import scorecard as training_page
from tests.trainer import tiny
from tests.trainer.command_line import lines, run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.config import EvaluateSection
from trainer.data import dataset
from trainer.data.held_out import held_out_examples
from trainer.errors import DataError, Interrupted
from trainer.evaluation.evaluate import held_out_loss
from trainer.model import model
from trainer.training import checkpoint
from trainer.training.reporter import Callbacks
from trainer.training.train import train
from trainer.training.validation import Validation, ValidationState

SHAPE = {"epochs": 4, "log_every": 100, "save_every": 0, "pack_tokens": 128, "warmup": 0.0}


def made(folder, **evaluate):
    rows = tiny.skill(40, held_out=8)
    return settings.load(tiny.train_toml(folder, rows, train=SHAPE, evaluate=evaluate))


def adapter_of(config) -> dict[str, torch.Tensor]:
    return load_file(config.out_path / "adapter" / "adapter_model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def evaluations(config) -> list[dict]:
    return [line for line in lines(config.out_path / "train.jsonl") if "held_out_loss" in line]


@pytest.fixture
def falling(monkeypatch):
    """Held-out losses that are not measured: lowest at the third evaluation."""

    def set_losses(*losses: float) -> None:
        waiting = list(losses)
        monkeypatch.setattr(Validation, "_loss", lambda _self: waiting.pop(0))

    return set_losses


@pytest.mark.parametrize(
    ("every", "steps", "interval"), [(0, 50, 0), (7, 50, 7), ("10%", 50, 5), ("10%", 3, 1), ("100%", 9, 9)]
)
def test_every_is_steps_or_a_share_of_all_steps(every, steps, interval):
    assert EvaluateSection(every=every).interval(steps) == interval


@pytest.mark.slow
def test_the_loss_is_that_of_evaluate_and_the_steps_keep_their_bits(tmp_path):
    plain = made(tmp_path / "plain")
    train(plain)
    watched = made(tmp_path / "watched", every="25%", max_new_tokens=8, sample_answers=2)
    done = train(watched)
    result = evaluations(watched)
    assert [line["step"] for line in result] == [5, 10, 15, 20][: len(result)]
    assert result[-1]["step"] == done.steps
    assert result[-1]["held_out_loss"] < result[0]["held_out_loss"]
    assert {len(line["answers"]) for line in result} == {2}
    assert all(answer["teacher"] for answer in result[-1]["answers"])
    assert done.best_step == done.steps  # it still falls
    assert same(adapter_of(plain), adapter_of(watched))
    student = model.load_trained_student(watched, watched.out_path / "adapter", torch.device("cpu"))
    renderer = dataset.Renderer(model.load_tokenizer(watched.base))
    examples = held_out_examples(dataset.read(watched).held_out, renderer, watched)
    assert held_out_loss(student, examples, watched) == pytest.approx(result[-1]["held_out_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "stop_at", [5, *(pytest.param(step, marks=pytest.mark.slow) for step in (7, 10, 20))]
)
def test_a_resumed_training_has_the_same_evaluations_and_adapter(tmp_path, stop_at):
    uninterrupted = made(tmp_path / "whole", every=5, sample_answers=0)
    train(uninterrupted)
    stopped = made(tmp_path / "stopped", every=5, sample_answers=0)

    stopped_after(stopped, stop_at)
    train(stopped)
    strip = [{**line, "seconds": 0} for line in evaluations(uninterrupted)]
    assert [{**line, "seconds": 0} for line in evaluations(stopped)] == strip
    assert same(adapter_of(uninterrupted), adapter_of(stopped))


def test_the_best_adapter_is_kept_and_patience_ends_the_training(tmp_path, falling, run_trainer):  # noqa: F811
    config = made(tmp_path, every=2, patience=3, sample_answers=0)
    falling(3.0, 2.0, 2.5, math.nan, 2.1)
    code, out, err = run_trainer("train", tmp_path / "train.toml", "--json")
    assert code == 0
    done = json.loads(out)
    assert (done["best_step"], done["held_out_loss"]) == (4, 2.0)
    assert (done["steps"], done["steps_now"], done["steps_done"]) == (20, 10, 10)
    assert "held-out loss 2.0000, the lowest so far" in err
    assert any("stopped after step 10 of 20" in note for note in done["notes"])
    page = (config.out_path / "train.html").read_text(encoding="utf-8")
    assert "Ended after 10 of 20 steps: as many evaluations as [evaluate] patience allows found" in page
    folder = config.out_path / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {f"step-{step:08d}" for step in (2, 4, 10)} - {
        "step-00000002"
    }
    best = checkpoint.adapter_of_step(folder, 4)
    written = adapter_of(config)
    stored = {name.replace(".default.weight", ".weight"): tensor for name, tensor in best.items()}
    assert same(stored, written)
    assert [line["held_out_loss"] for line in evaluations(config)] == [3.0, 2.0, 2.5, None, 2.1]
    # a training that patience ended is complete: again does nothing more
    again = train(config)
    assert (again.steps_now, again.steps_done) == (0, 10)
    assert same(written, adapter_of(config))


def test_old_checkpoints_go_and_the_best_stays(tmp_path, falling):
    config = made(tmp_path, every=2, sample_answers=0)
    config = config.model_copy(update={"train": config.train.model_copy(update={"save_every": 1})})
    falling(3.0, 2.0, *[4.0] * 8)
    done = train(config)
    names = sorted(path.name for path in (config.out_path / "checkpoints").iterdir())
    assert names == ["step-00000004", f"step-{done.steps - 1:08d}", f"step-{done.steps:08d}"]


def stopped_after(config, step: int) -> None:
    every_step = config.model_copy(update={"train": config.train.model_copy(update={"log_every": 1})})

    def stop(log) -> None:
        if log.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=f"step {step} of"):
        train(every_step, Callbacks(on_step=stop))


def test_a_training_that_goes_on_without_evaluations_writes_its_last_step(tmp_path, falling):
    config = made(tmp_path / "on", every=2, sample_answers=0)
    falling(2.0)
    stopped_after(config, 3)
    off = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every": 0})})
    done = train(off)
    assert done.best_step is None
    assert any("the best at step 2, don't count" in note and "every = 0" in note for note in done.notes)
    plain = made(tmp_path / "plain")
    train(plain)
    assert same(adapter_of(off), adapter_of(plain))


@pytest.mark.parametrize(("loss_rows", "best"), [(8, 2), (4, 10)])
def test_losses_of_other_held_out_rows_are_not_compared(tmp_path, falling, loss_rows, best):
    config = made(tmp_path, every=2, sample_answers=0, loss_rows=8)
    falling(0.5, *[2.0] * 3, 1.0, *[2.0] * 5)
    stopped_after(config, 3)
    other = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"loss_rows": loss_rows})}
    )
    done = train(other)
    assert done.best_step == best
    assert any("other held-out rows" in note for note in done.notes) is (best == 10)
    # a training that is complete keeps its adapter, whatever it would be measured with
    written = adapter_of(other)
    for change in ({"every": 0}, {"loss_rows": 2}):
        later = other.model_copy(update={"evaluate": other.evaluate.model_copy(update=change)})
        again = train(later)
        assert (again.steps_now, again.best_step) == (0, best)
        assert same(written, adapter_of(later))


def test_nothing_held_out_is_refused_by_name(tmp_path):
    toml = tiny.train_toml(
        tmp_path, tiny.skill(20), data={"eval_share": 0.0}, evaluate={"every": "10%", "patience": 2}
    )
    with pytest.raises(DataError, match="no held-out answer") as refused:
        train(settings.load(toml))
    assert refused.value.place == "evaluate.every"


def test_progress_survives_json():
    progress = ValidationState().after(2, math.nan)
    assert ValidationState.from_state(json.loads(json.dumps(progress.as_state()))) == progress
    progress = progress.after(4, 1.5).after(6, 1.6)
    assert ValidationState.from_state(json.loads(json.dumps(progress.as_state()))) == progress
    assert (progress.best_step, progress.worse) == (4, 1)


def test_the_page_shows_the_held_out_loss(tmp_path):
    path = tmp_path / "train.jsonl"
    rows = [
        {"step": 5, "steps": 10, "loss": 2.0, "accuracy": 0.5},
        {"step": 5, "steps": 10, "held_out_loss": 2.25, "best_step": 5, "answers": []},
        {"step": 10, "steps": 10, "loss": 1.0, "accuracy": 0.75},
        {"step": 10, "steps": 10, "held_out_loss": 1.75, "best_step": 10, "answers": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = training_page.training_charts(training_page.read_training(path))
    assert len(figures) == 3
    text = str(figures)
    assert "Held-out loss" in text
    assert "1.75" in text
    assert "step 10" in text

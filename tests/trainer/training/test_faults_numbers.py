"""Test faults 1-3, 27 and 34-36 of the catalogue: numbers, memory, devices."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from tests.trainer import tiny
from tests.trainer.command_line import lines, run_trainer, toml  # noqa: F401 - fixtures
from trainer.evaluation import evaluate
from trainer.training import step


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_01_a_loss_that_is_not_finite_once_is_skipped_and_counted(run_trainer, toml, monkeypatch, value):  # noqa: F811
    original, calls = step.pack_losses, []

    def poisoned(*args):
        calls.append(1)
        for loss, correct in original(*args):
            yield (loss * float(value) if len(calls) == 3 else loss), correct

    monkeypatch.setattr(step, "pack_losses", poisoned)
    code, out, _ = run_trainer("train", toml)
    assert code == 0
    log = lines(toml.parent / "out" / "train.jsonl")
    assert log[-1]["skipped"] == 1
    assert f"warning: 1 of {log[-1]['step']} steps were skipped" in out
    assert "among them" not in out
    assert all(line["loss"] == line["loss"] and abs(line["loss"]) < 100 for line in log)


def test_01_a_loss_that_stays_broken_stops_with_the_last_good_checkpoint(run_trainer, toml, monkeypatch):  # noqa: F811
    original, calls = step.pack_losses, []

    def poisoned(*args):
        calls.append(1)
        for loss, correct in original(*args):
            yield (loss * float("nan") if len(calls) > 4 else loss), correct

    monkeypatch.setattr(step, "pack_losses", poisoned)
    code, _, err = run_trainer("train", toml)
    assert code == 1
    assert "error[diverged]" in err
    assert "the last checkpoint is good" in err
    monkeypatch.setattr(step, "pack_losses", original)
    code, out, _ = run_trainer("train", toml)
    assert code == 0
    assert "resumed at step" in out


def test_a_training_that_ends_in_skipped_steps_says_so_and_is_not_exported(run_trainer, tmp_path):  # noqa: F811
    path = tiny.train_toml(tmp_path, tiny.skill(40, held_out=4), train={"lr": 1e30, "max_steps": 3})
    code, out, _ = run_trainer("train", path)
    assert code == 0
    assert "warning: 2 of 3 steps were skipped" in out
    assert "the last 2 among them" in out
    code, _, err = run_trainer("export", path, tmp_path / "merged")
    assert (code, "logits are not finite" in err, "lower [train] lr" in err) == (2, True, True)
    assert not (tmp_path / "merged").exists()


def test_a_training_of_which_every_step_was_skipped_writes_no_adapter(run_trainer, toml, monkeypatch):  # noqa: F811
    original = step.pack_losses

    def poisoned(*args):
        for loss, correct in original(*args):
            yield loss * float("nan"), correct

    monkeypatch.setattr(step, "pack_losses", poisoned)
    toml.write_text(toml.read_text().replace("[train]", "[train]\nmax_steps = 2"))
    for _ in range(2):  # the second one finds the checkpoint of the last step
        code, _, err = run_trainer("train", toml)
        assert (code, "error[diverged]" in err, "in all 2 steps" in err) == (1, True, True)
        assert not (toml.parent / "out" / "adapter").exists()


def test_02_a_gradient_that_is_not_finite_changes_nothing(run_trainer, toml, monkeypatch):  # noqa: F811
    original, calls, norms = torch.nn.utils.clip_grad_norm_, [], []

    def poisoned(parameters, bound):
        held = list(parameters)
        calls.append([p.detach().clone() for p in held])
        if len(calls) == 2:
            held[0].grad[0, 0] = float("inf")
        norm = original(held, bound)
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in held]))))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    assert run_trainer("train", toml)[0] == 0
    assert all(torch.equal(a, b) for a, b in zip(calls[1], calls[2], strict=True))  # step 2 was no step
    assert not all(torch.equal(a, b) for a, b in zip(calls[2], calls[3], strict=True))
    assert max(n for n in norms if n == n) <= 1.0 + 1e-4  # clipped


def test_03_out_of_memory_names_the_pack(run_trainer, toml, monkeypatch):  # noqa: F811
    original, calls = step.pack_losses, []

    def hungry(*args):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        yield from original(*args)

    monkeypatch.setattr(step, "pack_losses", hungry)
    code, _, err = run_trainer("train", toml)
    assert code == 1
    assert "error[memory]" in err
    assert "pack_tokens" in err
    monkeypatch.setattr(step, "pack_losses", original)
    assert "resumed at step 1" in run_trainer("train", toml)[1]


def test_03_other_runtime_errors_keep_their_own_words(toml, monkeypatch):  # noqa: F811
    from trainer import config
    from trainer.training.train import train

    def broken(*_args):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(step, "pack_losses", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(config.load(toml))


def test_27_nothing_is_loaded_by_a_worker_that_could_die(toml):  # noqa: F811
    from trainer import config
    from trainer.training.reporter import Callbacks
    from trainer.training.train import train

    before = threading.active_count()
    alive: list[int] = []
    train(config.load(toml), Callbacks(on_step=lambda _log: alive.append(threading.active_count())))
    assert set(alive) == {before}


def test_34_an_adapter_that_no_gradient_reaches_is_refused(run_trainer, toml, monkeypatch):  # noqa: F811
    original = step.pack_losses

    def deaf(*args):
        for loss, correct in original(*args):
            yield loss * 0.0, correct

    monkeypatch.setattr(step, "pack_losses", deaf)
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert "no gradient reaches the adapter" in err


@pytest.mark.parametrize(("key", "value"), [("lr", "0.0"), ("target", '["no_such_layer"]')])
def test_34_a_rate_of_zero_or_an_absent_target_is_refused(run_trainer, toml, key, value):  # noqa: F811
    text = toml.read_text()
    if key == "lr":
        text = text.replace("lr = 0.01", "lr = 0.0")
    else:
        text = text.replace("alpha = 8", f"alpha = 8\ntarget = {value}")
    toml.write_text(text)
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert key in err


def test_35_a_missing_gpu_is_reported_and_the_fallback_is_printed(run_trainer, toml, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    toml.write_text(toml.read_text().replace('device = "cpu"', 'device = "cuda"'))
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert "no CUDA device" in err
    toml.write_text(toml.read_text().replace('device = "cuda"', 'device = "fastest"'))
    code, out, _ = run_trainer("train", toml)
    assert code == 0
    assert "cpu, base float32, adapter float32" in out


def test_36_an_evaluation_that_breaks_costs_no_training(run_trainer, toml, monkeypatch):  # noqa: F811
    assert run_trainer("train", toml)[0] == 0
    kept = {p: p.read_bytes() for p in (toml.parent / "out").rglob("*.safetensors")}
    assert kept

    def broken(*_args, **_kwargs):
        raise RuntimeError("judge fell over")

    monkeypatch.setattr(evaluate, "generate_answers", broken)
    with pytest.raises(RuntimeError, match="judge fell over"):
        run_trainer("evaluate", toml)
    assert {p: p.read_bytes() for p in (toml.parent / "out").rglob("*.safetensors")} == kept
    monkeypatch.undo()
    assert json.loads((toml.parent / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 4

"""Test experiment trackers: the real packages offline (`make test-trackers`), and trainings without them."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.training.test_faults_checkpoints import half_done
from trainer import config as settings
from trainer.training import trackers
from trainer.training.train import train

TRAIN = {"epochs": 2, "pack_tokens": 128, "batch_tokens": 128, "log_every": 1}


def toml_of(folder, *names, **evaluation):
    section = {**TRAIN, **({"trackers": names} if names else {})}
    return tiny.train_toml(folder, tiny.skill(16, held_out=4), train=section, evaluate=evaluation)


def adapter_of(toml):
    return load_file(toml.parent / "out" / "adapter" / "adapter_model.safetensors")


@pytest.fixture
def proxy(monkeypatch) -> Iterator[list[bytes]]:
    """A proxy that every HTTP library would go through; what was asked of it."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096))

        threading.Thread(target=serve, daemon=True).start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
            monkeypatch.setenv(name.lower(), address)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield asked
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.trackers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_tracker_writes_here_sends_nothing_and_changes_no_bit(tmp_path, monkeypatch, proxy, name):
    for key in [k for k in os.environ if k.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(key)
    plain = toml_of(tmp_path / "plain", every=2)
    train(settings.load(plain))
    tracked = toml_of(tmp_path / "tracked", name, every=2)
    half_done(tracked, 2)
    done = train(settings.load(tracked))
    assert not any("tracker" in note for note in done.notes), done.notes
    wanted, mine = adapter_of(plain), adapter_of(tracked)
    assert all(torch.equal(wanted[key], mine[key]) for key in wanted)
    assert proxy == []
    out = tracked.parent / "out"
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    if name == "wandb":
        runs = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
        assert len(runs) == 2  # one for each start
        assert all(run.stat().st_size for run in runs)
        assert b"held_out_loss" in b"".join(run.read_bytes() for run in runs)
        return
    with sqlite3.connect(out / "mlflow" / "mlflow.db") as database:
        stored = dict(
            database.execute("SELECT step, value FROM metrics WHERE key = 'loss' ORDER BY timestamp")
        )
        [status] = database.execute("SELECT status FROM runs").fetchall()
    assert stored == pytest.approx(losses)
    assert status == ("FINISHED",)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path, run_trainer, monkeypatch, name):  # noqa: F811
    from harvester.system.command_line import extras

    original = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda each: None if each == name else original(each))
    code, _, err = run_trainer("train", toml_of(tmp_path, name))
    assert code == 2
    assert f"blackbox-distillation[{name}]" in err
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_a_tracker_that_fails_is_dropped_and_the_training_goes_on(tmp_path, monkeypatch):
    seen: list[int] = []

    def starts(config):
        def write(step, numbers):
            seen.append(step)
            if step == 3:
                raise OSError("No space left on device")

        return write

    monkeypatch.setitem(trackers._STARTERS, "wandb", starts)
    monkeypatch.setattr(trackers, "require_installed", lambda _: None)
    plain = toml_of(tmp_path / "plain")
    train(settings.load(plain))
    tracked = toml_of(tmp_path / "tracked", "wandb")
    done = train(settings.load(tracked))
    assert seen == [1, 2, 3]
    assert any("tracker wandb failed and was dropped: No space left" in note for note in done.notes)
    wanted, mine = adapter_of(plain), adapter_of(tracked)
    assert all(torch.equal(wanted[key], mine[key]) for key in wanted)


def test_trackers_may_change_on_resume(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._STARTERS, "mlflow", lambda _: lambda _step, _numbers: None)
    monkeypatch.setattr(trackers, "require_installed", lambda _: None)
    toml = toml_of(tmp_path)
    half_done(toml, 2)
    text = toml.read_text(encoding="utf-8").replace("[train]", '[train]\ntrackers = ["mlflow"]')
    toml.write_text(text, encoding="utf-8")
    assert train(settings.load(toml)).steps_now

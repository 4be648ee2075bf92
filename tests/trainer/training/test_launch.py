"""Test that one batch divided over two processes gives the gradients and the adapter of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import tiny
from trainer import config as settings
from trainer.model import model
from trainer.training import checkpoint
from trainer.training.reporter import Callbacks
from trainer.training.train import train

DEALT = {"train": {"epochs": 1, "batch_tokens": 1024, "max_length": 64, "pack_tokens": 128, "log_every": 1}}


@pytest.mark.long  # test_several_machines proves it in forked ranks, and the signal below starts a true fleet
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_two_processes_learn_what_one_does(tmp_path, dropout):
    rows = tiny.skill(60)
    shape = {**DEALT, "lora": {"dropout": dropout}}
    row = settings.load(tiny.train_toml(tmp_path / "one", rows, **shape))
    logs = []
    train(row, Callbacks(on_step=logs.append))
    toml = tiny.train_toml(tmp_path / "two", rows, **shape)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "trainer", "train", str(toml), "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRAINER_TRAIN_PROCESSES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [values] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    two = [json.loads(line) for line in (tmp_path / "two/out/train.jsonl").read_text().splitlines()]
    assert values["steps"] == len(two) == len(logs)
    for mine, theirs in zip(logs, two, strict=True):
        assert theirs["loss"] == pytest.approx(mine.loss, abs=1e-6)
        assert theirs["grad_norm"] == pytest.approx(mine.grad_norm, rel=1e-5)
    mine = load_file(row.out_path / "adapter/adapter_model.safetensors")
    theirs = load_file(tmp_path / "two/out/adapter/adapter_model.safetensors")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    # a checkpoint of two is a checkpoint of one
    resumed = train(settings.load(toml))
    assert resumed.steps_now == 0


@pytest.mark.long  # test_accumulation adds up the same, in two forked ranks
def test_ranks_add_up_what_they_hold(tmp_path):
    code = (
        "import torch\nfrom trainer.training.distributed import join_world\n"
        "with join_world() as world:\n"
        "    a, b = torch.full((2, 2), 1.0 + world.rank), torch.tensor(10.0 * (world.rank + 1))\n"
        "    world.sum_in_place([a, b])\n"
        "    assert a.tolist() == [[3.0, 3.0]] * 2 and float(b) == 30.0\n"
    )
    script = tmp_path / "sum.py"
    script.write_text(code)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert torch.distributed.is_available()


def fleet(toml: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """`trainer train` in two processes."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "trainer", "train", str(toml), "--processes", "2", "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.long
def test_two_processes_with_half_the_base_each_learn_what_one_does_and_either_resumes_the_other(tmp_path):
    rows = tiny.skill(60)
    shape = {
        "train": {**DEALT["train"], "batch_tokens": 384, "save_every": 1}
    }  # three packs a step: one idles
    config = settings.load(tiny.train_toml(tmp_path / "one", rows, **shape))
    uninterrupted = train(config)
    shape["train"]["shard"] = "always"
    toml = tiny.train_toml(tmp_path / "two", rows, **shape)
    killed = fleet(toml, HARVESTER_FAILPOINT="train.update:3")
    assert killed.returncode != 0
    checkpoints = sorted((tmp_path / "two/out/checkpoints").glob("step-*"))
    assert 0 < len(checkpoints) < uninterrupted.steps
    finished = fleet(toml)
    assert finished.returncode == 0, finished.stderr
    [values] = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    [note] = [note for note in values["notes"] if "sharded" in note]
    assert any(note.startswith("resumed at step 2") for note in values["notes"])
    mine = load_file(config.out_path / "adapter/adapter_model.safetensors")
    theirs = load_file(tmp_path / "two/out/adapter/adapter_model.safetensors")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    shutil.rmtree(checkpoints[0].parent.parent / "adapter")
    for late in sorted(checkpoints[0].parent.glob("step-*"))[-1:]:
        shutil.rmtree(late)  # the fleet's last step is left to one process
    alone = train(settings.load(toml))
    assert alone.steps_now == 1
    theirs = load_file(tmp_path / "two/out/adapter/adapter_model.safetensors")
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    layers = sum(p.numel() for n, p in base_of(config).named_parameters() if ".layers." in n)
    others = sum(p.numel() for n, p in base_of(config).named_parameters() if ".layers." not in n)
    assert float(note.split()[2]) == pytest.approx((layers / 2 + others) * 4 / 2**20, abs=0.06)


def base_of(config):
    return model.load_base(config.base, torch.device("cpu"))


def workers_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's workers by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        try:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        except OSError:  # a child that has ended
            continue
        ranks.update({int(each[5:]): child for each in environment if each.startswith(b"RANK=")})
    return ranks


# 80 steps: a signal after the first checkpoint comes long before the last.
STEPWISE = {**DEALT["train"], "epochs": 16, "batch_tokens": 384, "save_every": 5, "log_every": 1000}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, fork_server) -> dict[str, torch.Tensor]:
    """The adapter of two processes that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    toml = tiny.train_toml(folder, tiny.skill(60), train=STEPWISE)
    ended = fork_server("command", words=["train", toml], world=2)
    assert ended["code"] == 0, ended["err"]
    return load_file(folder / "out/adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    "event",
    [
        pytest.param("SIGTERM", marks=pytest.mark.slow),
        pytest.param("SIGINT", marks=pytest.mark.long),
        pytest.param("a rank is killed", marks=pytest.mark.long),
    ],
)
def test_a_fleet_ends_as_one_with_a_checkpoint_and_resumes_to_the_same_bits(
    tmp_path, undisturbed, fork_server, event
):
    """The log is written every 1,000 steps: the end does not wait for a line of the log."""
    toml = tiny.train_toml(tmp_path, tiny.skill(60), train=STEPWISE)
    out = tmp_path / "out"
    words = [sys.executable, "-W", "ignore", "-m", "trainer", "train", str(toml), "--processes", "2"]
    running = subprocess.Popen(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not list(out.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.01)
    workers = workers_of(running.pid)
    assert sorted(workers) == [0, 1]
    if event == "a rank is killed":
        os.kill(workers[1], signal.SIGKILL)
    else:
        running.send_signal(signal.Signals[event])
    _, err = running.communicate(timeout=240)
    assert running.returncode == {"SIGTERM": 143, "SIGINT": 130}.get(event, 75), err
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())
    newest, _ = checkpoint.newest_valid(out / "checkpoints")
    if event != "a rank is killed":  # it lets the others end no step
        assert f"step {newest.step} of" in err  # the last step that was made, not the last multiple of 5
    resumed = fork_server("command", words=["train", toml], world=2)
    assert resumed["code"] == 0, resumed["err"]
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], undisturbed[name]) for name in undisturbed)

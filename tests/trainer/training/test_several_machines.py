"""Test trainings on two machines, here folders and groups of processes on loopback, against one process."""

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
from tests.trainer.command_line import lines
from tests.trainer.training.test_nodes import free_port
from tests.trainer.training.test_run_workers import alive
from tests.waiting import until
from trainer.training import checkpoint

# Three packs a step, of four processes: one has none. The last step of an epoch has fewer.
UNEVEN = {
    "epochs": 2,
    "batch_tokens": 384,
    "pack_tokens": 128,
    "max_length": 64,
    "log_every": 1,
    "save_every": 2,
}
ROWS = 60
MACHINES = {"world": 4, "nodes": 2}


def tomls(folder: Path, **train: object) -> list[Path]:
    """train.toml of two machines, each with its own copy of base and corpus and its own output folder."""
    made = tiny.train_toml(folder / "a", tiny.skill(ROWS), train={**UNEVEN, **train}, lora={"dropout": 0.25})
    shutil.copytree(folder / "a", folder / "b")
    return [made, folder / "b" / "train.toml"]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out/adapter/adapter_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def words_of(made: list[Path], *more: str) -> list[list[str]]:
    return [["train", str(path), *more] for path in made]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, fork_server) -> Path:
    """The folder of a training in one process."""
    folder = tmp_path_factory.mktemp("alone")
    [toml, _] = tomls(folder)
    ended = fork_server("command", words=["train", toml])
    assert ended["code"] == 0, ended["err"]
    return toml.parent


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, fork_server) -> Path:
    """The folder of the first of two machines, whose training nobody stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    made = tomls(folder)
    ended = fork_server("command", **MACHINES, words_of_nodes=words_of(made))
    assert ended["code"] == 0, ended["err"]
    return made[0].parent


def assert_equal_to_1e5(folder: Path, alone: Path) -> None:
    mine, theirs = adapter_of(alone), adapter_of(folder)
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 1e-5
    logs = [lines(each / "out/train.jsonl") for each in (alone, folder)]
    assert len(logs[0]) == len(logs[1])
    for one, other in zip(*logs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_machines_learn_what_one_process_does_and_only_the_first_writes(unbroken, alone):
    assert_equal_to_1e5(unbroken, alone)
    second = unbroken.parent / "b"
    assert not (second / "out" / "adapter").exists()
    assert not (second / "out" / "train.jsonl").exists()


@pytest.mark.slow
def test_a_base_that_is_split_over_two_machines_learns_the_same(tmp_path, fork_server, alone):
    made = tomls(tmp_path, shard="always")
    ended = fork_server("command", **MACHINES, words_of_nodes=words_of(made))
    assert ended["code"] == 0, ended["err"]
    assert "in each of 4 processes" in ended["err"]
    assert_equal_to_1e5(tmp_path / "a", alone)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["3", "0"])
def test_a_lost_rank_ends_all_by_name_and_a_resume_gives_the_same_bits(tmp_path, fork_server, unbroken, rank):
    """Only one machine has the checkpoint: it sends it to the other one."""
    made = tomls(tmp_path)
    killed = fork_server(
        "command",
        **MACHINES,
        words_of_nodes=words_of(made),
        env_of_ranks={rank: {"HARVESTER_FAILPOINT": "train.update:4"}},
    )
    assert killed["err"].count("error[lost]: another process of this training ended") == 3
    assert "Traceback" not in killed["err"]
    if rank == "3":
        assert killed["code"] == 75
    out = tmp_path / "a/out"
    newest, skipped = checkpoint.newest_valid(out / "checkpoints")
    assert skipped == []
    # The others may lack what rank 3 sent last, of step 4. A lost leader leaves that of `save_every`.
    assert newest.step in ({3, 4} if rank == "3" else {2})
    assert not (tmp_path / "b/out/checkpoints").exists()
    if rank == "0":  # another machine came first: what it led is on the second one
        (tmp_path / "b/out").mkdir(exist_ok=True)
        (out / "checkpoints").rename(tmp_path / "b/out/checkpoints")
    resumed = fork_server("command", **MACHINES, words_of_nodes=words_of(made, "--json"))
    assert resumed["code"] == 0, resumed["err"]
    assert f"resumed at step {newest.step}" in resumed["err"]
    assert same(adapter_of(tmp_path / "a"), adapter_of(unbroken))


@pytest.mark.slow  # several processes
def test_other_settings_on_one_machine_are_refused_by_name(tmp_path, fork_server):
    made = tomls(tmp_path)
    made[1].write_text(made[1].read_text().replace("lr = 0.01", "lr = 0.02"))
    ended = fork_server("command", **MACHINES, words_of_nodes=words_of(made))
    assert ended["code"] == 2
    said = "process 2 has other inputs than process 0: train.lr 0.01 there, 0.02 here"
    assert ended["err"].count(said) == 4


@pytest.mark.slow
def test_other_rows_on_one_machine_are_refused_by_name(tmp_path, fork_server):
    made = tomls(tmp_path)
    rows = tiny.skill(ROWS)
    tiny.corpus(made[1].parent / "store", [*rows[:-1], tiny.sample(ROWS, "backwards: zz", "zz")])
    ended = fork_server("command", **MACHINES, words_of_nodes=words_of(made))
    assert ended["code"] == 2
    assert "has other inputs than process 0: corpus " in ended["err"]


@pytest.mark.slow
def test_a_process_that_is_lost_before_the_first_step_is_named(tmp_path, fork_server):
    made = tomls(tmp_path)
    shutil.rmtree(made[1].parent / "base")  # the second machine has no student
    ended = fork_server("command", **MACHINES, words_of_nodes=words_of(made))
    assert "Traceback" not in ended["err"]
    assert ended["err"].count("ended before the first step") == 2
    assert ended["err"].count("error[student]") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "makers"), [(True, [{"0"}]), (False, [{"0"}, {"2", "3"}])])
def test_a_token_store_is_made_once_or_once_on_each_machine(tmp_path, fork_server, shared, makers):
    """Where machines share the folder their locks may not work: the first one makes the store."""
    made = tomls(tmp_path, max_steps=1)
    if shared:
        for path in made:
            path.write_text(path.read_text().replace("[data]", f'[data]\ncache = "{tmp_path}/cache"'))
    makes = tmp_path / "makes"
    ended = fork_server(
        "command", **MACHINES, words_of_nodes=words_of(made), makes=str(makes), locks=not shared
    )
    assert ended["code"] == 0, ended["err"]
    ranks = makes.read_text().split()
    assert len(ranks) == len(makers)
    assert all(any(rank in group for rank in ranks) for group in makers)
    assert not list(tmp_path.rglob("*.mark"))


def start_machines(made: list[Path], *more: str, **environment: str) -> list[subprocess.Popen[str]]:
    """`trainer train` on two machines with two processes each, as somebody starts it there."""
    endpoint = ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "7", "--nnodes", "2"]
    endpoint += ["--processes", "2"]
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "trainer", "train", str(path), *endpoint, *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in made
    ]


def workers_of(launcher: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.long  # six processes that load torch, twice
@pytest.mark.parametrize("event", ["SIGTERM to the second machine", "a launcher is killed", "nothing"])
def test_the_commands_of_two_machines_end_together_and_resume(tmp_path, unbroken, fork_server, event):
    made = tomls(tmp_path, epochs=2 if event == "nothing" else 40)
    machines = start_machines(made, "--json")
    if event != "nothing":
        deadline = time.monotonic() + 200
        while not list((tmp_path / "a/out/checkpoints").glob("step-*")):
            assert time.monotonic() < deadline
            assert all(machine.poll() is None for machine in machines), machines[0].communicate()
            time.sleep(0.02)
        workers = [pid for machine in machines for pid in workers_of(machine.pid)]
        # c10d numbers the machines by their arrival: the leader is the one that writes.
        if event.startswith("SIGTERM"):
            machines[1].send_signal(signal.SIGTERM)
        else:
            machines[1].kill()
    ends = [machine.communicate(timeout=300) for machine in machines]
    codes = [machine.returncode for machine in machines]
    assert not any("Traceback" in err for _, err in ends), ends
    if event == "nothing":
        assert codes == [0, 0], ends
        leader = next(path.parent for path in made if (path.parent / "out/adapter").exists())
        assert same(adapter_of(leader), adapter_of(unbroken))
        [result] = [json.loads(out) for out, _ in ends if out.strip()]
        assert result["steps_now"] == result["steps"]
        return
    until(lambda: not any(map(alive, workers)))
    if event.startswith("SIGTERM"):
        assert codes == [143, 143], ends
    else:
        assert codes == [75, -9], ends
        assert "error[lost]" in ends[0][1]
    newest, skipped = checkpoint.newest_valid(tmp_path / "a/out/checkpoints")
    assert skipped == []
    assert newest.step > 0


@pytest.mark.long
def test_torchrun_of_two_machines_starts_it_too(tmp_path, unbroken):
    made = tomls(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nnodes=2"]
    command += ["--nproc-per-node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    machines = [
        subprocess.Popen(
            [*command, "-m", "trainer", "train", str(path)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in made
    ]
    ends = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], ends
    leader = next(path.parent for path in made if (path.parent / "out/adapter").exists())
    assert same(adapter_of(leader), adapter_of(unbroken))

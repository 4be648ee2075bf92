"""Test faults 3, 4 and 8 of the catalogue with the kernel's own limits: memory, disk space, signals."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.trainer import tiny
from trainer.training import checkpoint

MIB = 1 << 20


def toml_of(folder: Path, **train: object) -> Path:
    shape = {"epochs": 3, "log_every": 1, "save_every": 1, "pack_tokens": 128, **train}
    return tiny.train_toml(folder, tiny.skill(40), train=shape)


def last_step(toml: Path) -> int:
    newest, _ = checkpoint.newest_valid(toml.parent / "out" / "checkpoints")
    return newest.step if newest else 0


@pytest.mark.slow
def test_03_a_host_without_memory_is_reported_with_the_pack_and_nothing_is_lost(tmp_path, fork_server):
    rows = [tiny.sample(i, "q " * 40, "word " * 400) for i in range(80)]
    wide = {"batch_tokens": 200_000, "max_length": 4096, "pack_tokens": 200_000, "epochs": 1}
    toml = tiny.train_toml(tmp_path, rows, train=wide, data={"eval_share": 0.0})
    ended = fork_server("command", words=("train", toml), step_bytes=128 * MIB)
    assert (ended["code"], ended["signal"]) == (1, 0), ended["err"]
    assert "error[memory]" in ended["err"]
    assert "80 examples" in ended["err"]
    assert "pack_tokens" in ended["err"]
    assert "Traceback" not in ended["err"]


def test_04_sigterm_from_outside_ends_with_a_checkpoint_and_the_next_run_goes_on(tmp_path, fork_server):
    toml = toml_of(tmp_path, epochs=400)
    log = tmp_path / "out" / "train.jsonl"
    ended = fork_server("command", words=("train", toml), signal_when=[str(log), signal.SIGTERM])
    assert (ended["code"], ended["signal"]) == (143, 0), ended["err"]
    done = len(log.read_text().splitlines())
    assert f"stopped after step {done} of" in ended["err"]
    assert last_step(toml) == done


@pytest.mark.slow
def test_08_a_disk_that_is_full_costs_checkpoints_then_the_adapter_never_what_lies_there(
    tmp_path, fork_server
):
    toml = toml_of(tmp_path)
    log = tmp_path / "out" / "train.jsonl"
    ended = fork_server("command", words=("train", toml), limits={"RLIMIT_FSIZE": 20_000})
    assert (ended["code"], ended["signal"]) == (5, 0), ended["err"]
    assert "adapter can't be written" in ended["err"]
    assert "Traceback" not in ended["err"]
    assert not (tmp_path / "out" / "adapter").exists()
    assert not list((tmp_path / "out").glob("**/.*tmp*"))
    steps = json.loads(log.read_text().splitlines()[-1])["steps"]
    ended = fork_server("command", words=("train", toml))  # room again
    assert ended["code"] == 0, ended["err"]
    assert last_step(toml) == steps
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_08_a_log_that_can_not_be_written_stops_no_training(tmp_path, fork_server):
    toml = toml_of(tmp_path)
    (tmp_path / "out" / "train.jsonl").mkdir(parents=True)
    ended = fork_server("command", words=("train", toml))
    assert ended["code"] == 0, ended["err"]
    assert "warning: train.jsonl not written" in ended["err"]


@pytest.mark.parametrize(
    ("place", "code", "words"),
    [("out", 2, "is not a folder"), ("out/LOCK", 5, "output folder can't be written")],
)
def test_08_an_output_folder_that_can_not_be_made_is_reported(tmp_path, fork_server, place, code, words):
    toml = toml_of(tmp_path)
    odd = tmp_path / place
    odd.parent.mkdir(exist_ok=True)
    odd.mkdir() if place.endswith("LOCK") else odd.write_text("a file")
    ended = fork_server("command", words=("train", toml))
    assert (ended["code"], words in ended["err"]) == (code, True), ended["err"]

"""Test faults 3, 4 and 8 of the catalogue with the kernel's own limits: memory, disk space, signals."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401
from trainer import config as settings
from trainer.errors import StoreError, StoreFull
from trainer.training import checkpoint
from trainer.training.reporter import Callbacks
from trainer.training.train import train

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
    assert "error[store]" in ended["err"]  # a limit of files is no full disk
    assert "adapter can't be written: a file may not be so large here" in ended["err"]
    assert "ulimit -f" in ended["err"]
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


@pytest.mark.parametrize("name", ["adapter", "checkpoints"])
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_08_a_file_in_the_place_of_an_output_folder_is_refused_before_the_first_step(
    tmp_path,
    run_trainer,  # noqa: F811
    name,
    verb,
):
    toml = toml_of(tmp_path)
    odd = tmp_path / "out" / name
    odd.parent.mkdir()
    odd.write_text("mine")
    code, _, err = run_trainer(verb, toml)
    assert code == 2
    assert "a file lies where the training writes a folder" in err
    assert str(odd) in err
    assert "set another [out] path" in err
    assert odd.read_text() == "mine"
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_08_checkpoints_may_lie_behind_a_link_and_the_student_may_not(tmp_path, run_trainer):  # noqa: F811
    toml = toml_of(tmp_path, epochs=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter").symlink_to(tmp_path / "elsewhere")
    code, _, err = run_trainer("train", toml)
    assert (code, "a symbolic link lies where" in err) == (2, True), err
    (tmp_path / "out" / "adapter").rename(tmp_path / "out" / "checkpoints")
    code, _, err = run_trainer("train", toml)
    assert code == 0, err
    assert list((tmp_path / "elsewhere").glob("step-*"))


def test_08_an_adapter_folder_that_appears_as_a_file_during_the_steps_is_named_as_one(tmp_path, monkeypatch):
    config = settings.load(toml_of(tmp_path, epochs=1))

    def put_a_file(*_told) -> None:
        (tmp_path / "out" / "adapter").write_text("mine")

    with pytest.raises(StoreError, match="a file lies where a folder should") as raised:
        train(config, Callbacks(on_start=put_a_file))
    assert not isinstance(raised.value, StoreFull)
    assert raised.value.place == str(tmp_path / "out" / "adapter")
    assert (tmp_path / "out" / "adapter").read_text() == "mine"


def test_08_a_page_that_a_folder_stands_in_the_way_of_is_named_so(tmp_path, run_trainer):  # noqa: F811
    toml = toml_of(tmp_path, epochs=1)
    (tmp_path / "out" / "doctor.html").mkdir(parents=True)
    code, _, err = run_trainer("doctor", toml)
    assert code == 5, err
    assert "doctor.html" in err
    assert "a folder lies where a file should" in err
    assert "full" not in err


@pytest.mark.parametrize(
    ("name", "words"),
    [("x" * 300, "name is too long"), ("file/merged", "a file lies where a folder should")],
)
def test_08_an_export_that_can_not_be_written_says_why(learned, tmp_path, run_trainer, name, words):  # noqa: F811
    config, _ = learned
    (tmp_path / "file").write_text("")
    code, _, err = run_trainer("export", config.root / "train.toml", tmp_path / name)
    assert code in {2, 5}, err
    assert words in err
    assert "full" not in err

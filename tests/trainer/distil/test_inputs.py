"""Test what `trainer distil` takes for the input of a stage, and its configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer.data import answers
from trainer.distil import inputs
from trainer.distil.config import NamedFile, load_distil
from trainer.distil.inputs import content_of, key_of
from trainer.distil.pipeline import Distillation
from trainer.distil.records import StageResult
from trainer.errors import ConfigError
from trainer.starter import write_starter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of `trainer init`."""
    write_starter(tmp_path / "run")
    return tmp_path / "run"


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_starter_is_read_and_never_overwritten(folder: Path) -> None:
    files = load_distil(folder / "distil.toml")
    assert (files.store, files.folder) == (folder / "store", folder / "distil")
    assert files.config.mock_teacher
    assert files.train.base == folder / "base"
    assert (folder / "base" / "model.safetensors").is_file()
    splits = {
        json.loads(line)["split"]
        for path in folder.glob("prompts/*.jsonl")
        for line in path.read_text().splitlines()
    }
    assert splits == {"train", "held_out"}
    before = (folder / "harvest.toml").read_text()
    with pytest.raises(ConfigError, match="exists already"):
        write_starter(folder)
    assert (folder / "harvest.toml").read_text() == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("curate.toml", 'corpus = "store"', 'corpus = "other"', r"curate.toml: corpus: reads \S+other"),
        ("train.toml", 'corpus = "curated"', 'corpus = "store"', r"let it name the out of curate.toml"),
        ("distil.toml", 'curate = "curate.toml"\n', "", r"let it name the \[store\] path of harvest.toml"),
        ("distil.toml", "mock_teacher", "mock_techer", "unknown key 'mock_techer'"),
        ("distil.toml", 'train = "train.toml"\n', "", "a distil.toml needs harvest and train"),
        ("distil.toml", 'harvest = "harvest.toml"', 'harvest = "none.toml"', "none.toml"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    run_trainer,  # noqa: F811
    folder: Path,
    name: str,
    old: str,
    new: str,
    message: str,
) -> None:
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_distil(folder / "distil.toml")
    code, _, err = run_trainer("distil", folder / "distil.toml")
    assert (code, "error[config]" in err) == (2, True)
    assert not (folder / "store").exists()


@pytest.mark.parametrize("out", [".", "..", "base", "base/out", "prompts", "store", "curated"])
def test_an_output_folder_that_would_hide_inputs_is_refused(run_trainer, folder: Path, out: str) -> None:  # noqa: F811
    text = (folder / "distil.toml").read_text()
    assert 'out = "distil"' in text
    (folder / "distil.toml").write_text(text.replace('out = "distil"', f'out = "{out}"'))
    before = sorted(folder.rglob("*"))
    code, _, err = run_trainer("distil", folder / "distil.toml")
    assert (code, "give it a folder of its own" in err) == (2, True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "train", "--until", "harvest"), "harvest comes before train"),
        (("--from", "curate"), "the stage harvest was never done"),
    ],
)
def test_stages_that_can_not_be_run_are_named(run_trainer, folder: Path, words, message) -> None:  # noqa: F811
    code, _, err = run_trainer("distil", folder / "distil.toml", *words)
    assert (code, message in err) == (2, True)


def test_a_mock_teacher_needs_an_address_of_this_machine(run_trainer, folder: Path) -> None:  # noqa: F811
    text = (folder / "harvest.toml").read_text()
    address = next(line for line in text.splitlines() if line.startswith("base_url"))
    (folder / "harvest.toml").write_text(text.replace(address, 'base_url = "https://api.example.org/v1"'))
    code, _, err = run_trainer("distil", folder / "distil.toml")
    assert (code, "needs a base_url on this machine" in err) == (2, True)


def test_a_stage_reads_the_files_that_its_texts_name(tmp_path: Path) -> None:
    for name in ("prompts/a.jsonl", "prompts/b.jsonl", "evals/deep/set.jsonl", "checks.py", "unnamed.txt"):
        write(tmp_path / name)
    write(tmp_path / "store" / "journal.db")
    table: dict[str, Any] = {
        "prompts": {
            "files": ["prompts/*.jsonl"],
            "system": "Answer *briefly*, with **care**: it/is [no] path",
        },
        "decontaminate": {"sets": ["evals"]},
        "verify": {"sum": {"kind": "python", "function": "checks:is_right"}},
        "store": {"path": "store"},
        "elsewhere": [".", "", "x" * 5000, "nul\0", str(tmp_path / "checks.py")],
    }
    file = NamedFile(tmp_path / "harvest.toml", table)
    read = content_of(file, [tmp_path / "store"])
    assert read["files"].keys() == {"prompts/a.jsonl", "prompts/b.jsonl", "evals/deep/set.jsonl", "checks.py"}
    key = key_of(harvest=read)
    assert key_of(harvest=content_of(file, [tmp_path / "store"])) == key
    for name, is_read in (
        ("unnamed.txt", False),
        ("store/journal.db", False),
        ("evals/deep/set.jsonl", True),
    ):
        write(tmp_path / name, "changed")
        assert (key_of(harvest=content_of(file, [tmp_path / "store"])) != key) == is_read
        write(tmp_path / name)
    write(tmp_path / "prompts" / "c.jsonl")
    assert key_of(harvest=content_of(file, [tmp_path / "store"])) != key


@pytest.mark.parametrize("weights", ["row", "prompt"])
def test_a_training_stage_is_done_again_if_prompts_share_their_weight_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    train = folder / "train.toml"
    train.write_text(train.read_text().replace("[data]\n", f'[data]\nweights = "{weights}"\n'))
    made = {"out": str(tiny.corpus(folder / "curated", tiny.skill(4)))}

    def key() -> str:
        pipeline = Distillation(load_distil(folder / "distil.toml"), print, print)
        pipeline._done["curate"] = StageResult("curate", "key", made, 0.0, is_new=False)
        return pipeline._plan_of("train")[0]

    before = key()
    assert key() == before
    monkeypatch.setattr(answers, "_SHARED_BY_PROMPT", 1)
    assert (key() != before) == (weights == "prompt")


def test_a_large_file_counts_by_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "weights", "x" * 100)
    file = NamedFile(tmp_path / "train.toml", {"base": "weights"})
    monkeypatch.setattr(inputs, "MOST_BYTES", 10)
    key = key_of(train=content_of(file, []))
    assert key_of(train=content_of(file, [])) == key
    os.utime(path, ns=(1, 1))
    assert key_of(train=content_of(file, [])) != key

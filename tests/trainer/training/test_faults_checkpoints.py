"""Test faults 4-15, 28, 30, 32 and 33 of the catalogue: checkpoints on disk, and other processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from harvester.store import reader
from harvester.system.files import sha256_of
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from trainer import config as settings
from trainer import process
from trainer.errors import CheckpointError, FindingsError, Interrupted, StoreFull
from trainer.publish.export import export_merged
from trainer.training import checkpoint
from trainer.training.reporter import Callbacks
from trainer.training.train import train

FILES = ("MANIFEST.json", "state.json", "adapter.safetensors", "optimiser.safetensors")


def stop_after(step: int):
    def on_step(log) -> None:
        if log.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def half_done(toml: Path, steps: int = 3) -> Path:  # noqa: F811
    with pytest.raises(Interrupted):
        train(settings.load(toml), Callbacks(on_step=stop_after(steps)))
    return toml.parent / "out" / "checkpoints"


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "adapter" / "adapter_model.safetensors")


def test_04_sigterm_ends_after_the_step_with_a_checkpoint(run_trainer, toml, monkeypatch):  # noqa: F811
    original = train

    def stopped(config, _callbacks, **more):
        return original(config, Callbacks(on_step=stop_after(2)), **more)

    monkeypatch.setattr("trainer.training.train.train", stopped)
    code, _, err = run_trainer("train", toml)
    assert code == 143
    assert "after step 2" in err
    assert checkpoint.newest_valid(toml.parent / "out" / "checkpoints")[0].step == 2


@pytest.mark.parametrize("method", ["lora", "full"])
def test_an_adapter_of_fewer_steps_than_the_last_checkpoint_is_written_anew(tmp_path, monkeypatch, method):
    path = tiny.train_toml(tmp_path, tiny.skill(40, held_out=4), train={"epochs": 1, "method": method})
    if method == "full":
        path.write_text(path.read_text().replace("[lora]\nrank = 4\nalpha = 8\n", ""))
    name = {"lora": "adapter/adapter_model.safetensors", "full": "model/model.safetensors"}[method]
    file = tmp_path / "out" / name
    train(settings.load(path))
    first = file.read_bytes()
    path.write_text(path.read_text().replace("epochs = 1", "epochs = 2"))
    refused = []

    def refuse(*told, **_more):
        refused.append(told)
        raise StoreFull("the adapter can't be written: no space", place="out")

    monkeypatch.setattr("trainer.training.train.write_adapter", refuse)
    with pytest.raises(StoreFull):
        train(settings.load(path), allow_change=True)
    monkeypatch.undo()
    assert len(refused) == 1
    assert file.read_bytes() == first

    assert train(settings.load(path), allow_change=True).steps_now == 0
    written = file.read_bytes()
    assert written != first
    number = file.stat().st_ino
    train(settings.load(path), allow_change=True)
    assert file.stat().st_ino == number  # what is right is left alone
    file.write_bytes(written[:-100])
    train(settings.load(path), allow_change=True)
    assert file.read_bytes() == written
    lineage = file.with_name("lineage.json")
    content = lineage.read_text()
    lineage.write_text('{"lineages": [5]}')  # `evaluate` and `export` refuse it: "train the adapter again"
    with pytest.raises(FindingsError, match=r"lineage\.json was changed"):
        export_merged(settings.load(path), tmp_path / "merged")
    train(settings.load(path), allow_change=True)
    assert lineage.read_text() == content


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_tokens = 256", "batch_tokens = 1024", "none is made"),
        ("batch_tokens = 256", "batch_tokens = 128", "learned again"),
        ("epochs = 1", "epochs = 2", ""),
    ],
)
def test_a_changed_order_of_rows_is_said_on_resume(tmp_path, old, new, said):
    path = tiny.train_toml(tmp_path, tiny.skill(40, held_out=4), train={"epochs": 1, "log_every": 1})
    whole = train(settings.load(path)).steps
    shutil.rmtree(tmp_path / "out")
    half_done(path, 3)
    path.write_text(path.read_text().replace(old, new))
    done = train(settings.load(path), allow_change=True)
    warnings = [note for note in done.notes if note.startswith("warning")]
    assert [said in note for note in warnings] == [True] * bool(said)
    assert (done.steps_now == 0) is (said == "none is made")
    assert whole > 3


def two_answers(*numbers: int):
    """Ten prompts with two answers each, with these numbers in turn; every other prompt has long answers."""
    texts = ["abc" * (1 + at % 2 * 4) + "de"[at // 10] for at in range(20)]
    return [
        tiny.sample(number, f"say {at % 10}", texts[at], sample_index=at // 10)
        for at, number in enumerate(numbers)
    ]


def test_rows_that_only_weigh_otherwise_are_not_said_to_be_learned_again_on_resume(tmp_path):
    sizes = {"batch_tokens": 64, "max_length": 64, "log_every": 1}
    path = tiny.train_toml(tmp_path, two_answers(*range(20)), data={"weights": "row"}, train=sizes)
    half_done(path, 3)
    path.write_text(path.read_text().replace('"row"', '"prompt"'))
    done = train(settings.load(path), allow_change=True)
    assert done.steps_now == done.steps - 3 > 0
    assert any(note.startswith("changed on the way: corpus ") for note in done.notes)
    assert not [note for note in done.notes if note.startswith("warning")]
    assert any("if the rows themselves changed" in note for note in done.notes)


@pytest.mark.parametrize("knows_lengths", [True, False])
def test_as_many_rows_in_another_order_are_said_on_resume(tmp_path, knows_lengths):
    sizes = {"batch_tokens": 64, "max_length": 64, "log_every": 1}
    path = tiny.train_toml(tmp_path, two_answers(*range(20)), train=sizes)
    folder = half_done(path, 3)
    stored = checkpoint.newest_valid(folder)[0]
    if not knows_lengths:  # as checkpoints of earlier versions
        state = {key: value for key, value in stored.state.items() if key != "lengths"}
        assert state != stored.state
        shutil.rmtree(folder)
        checkpoint.save(folder, replace(stored, state=state))
    shutil.rmtree(tmp_path / "store")
    tiny.corpus(tmp_path / "store", two_answers(0, *range(20, 1, -1)))
    done = train(settings.load(path), allow_change=True)
    assert done.steps_now == done.steps - 3 > 0
    assert any("are learned again" in note for note in done.notes) is knows_lengths
    assert any("if the rows themselves changed" in note for note in done.notes) is not knows_lengths


def test_04_a_second_sigterm_ends_now():
    with process.stop_signals() as sent:
        os.kill(os.getpid(), signal.SIGTERM)
        assert sent == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", ["none", "one byte", "half", "all but one", "missing", "a flipped bit"])
def test_06_a_torn_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, name, left):
    for step in (1, 2):
        tensors = {"a/w": torch.full((4,), float(step))}
        checkpoint.save(tmp_path, checkpoint.Checkpoint(step, {"settings": {}}, tensors, tensors))
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    cut = {"none": 0, "one byte": 1, "half": len(content) // 2, "all but one": len(content) - 1}
    if left == "missing":
        file.unlink()
    elif left == "a flipped bit":
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        file.write_bytes(content[: cut[left]])
    newest, skipped = checkpoint.newest_valid(tmp_path)
    assert (newest.step, len(skipped)) == (1, 1)
    assert skipped[0].startswith("step-00000002: ")


def test_07_everything_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def noted_sync(handle):
        events.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    def noted_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {}, {"w": torch.ones(2)}, {"w/m": torch.ones(2)}))
    at = events.index("rename")
    assert set(events[: at - 2]) == {"adapter.safetensors", "optimiser.safetensors", "state.json"}
    assert events[at - 2 : at] == ["MANIFEST.json", ".step-00000001.tmp"]
    assert events[at + 1 :] == [tmp_path.name]


def test_08_a_full_disk_costs_a_warning_and_the_old_checkpoint_stays(run_trainer, toml, monkeypatch):  # noqa: F811
    original, calls = shutil.disk_usage, []

    def full(folder):
        calls.append(1)
        usage = original(folder)
        return usage._replace(free=10) if len(calls) > 2 else usage

    monkeypatch.setattr(shutil, "disk_usage", full)
    code, out, _ = run_trainer("train", toml)
    assert code == 0
    assert "warning: checkpoint of step 3 not written" in out
    assert checkpoint.newest_valid(toml.parent / "out" / "checkpoints")[0].step == 2
    assert (toml.parent / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert not list((toml.parent / "out" / "checkpoints").glob(".*"))


def test_08_an_old_checkpoint_stays_until_the_new_one_reads_back(tmp_path, monkeypatch):
    tensors = {"w": torch.ones(2)}
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {}, tensors, {"w/m": torch.ones(2)}))
    monkeypatch.setattr(checkpoint, "KEEP_NEWEST", 1)
    original = checkpoint.save_file
    monkeypatch.setattr(  # a write that says it went well and stored something else
        checkpoint, "save_file", lambda t, path: original({name: x * 0 for name, x in t.items()}, path)
    )
    with pytest.raises(CheckpointError, match="other than it was written"):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(2, {}, tensors, {"w/m": torch.ones(2)}))
    assert (tmp_path / "step-00000001").is_dir()


def test_06_a_checkpoint_of_another_format_is_skipped_and_named(tmp_path):
    state = checkpoint.Checkpoint(1, {}, {"w": torch.ones(2)}, {"w/m": torch.ones(2)})
    manifest = checkpoint.save(tmp_path, state) / "MANIFEST.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    newest, skipped = checkpoint.newest_valid(tmp_path)
    assert newest is None
    assert "format 99" in skipped[0]


def test_08_a_write_that_fails_half_way_leaves_no_litter(tmp_path, monkeypatch):
    keep = checkpoint.Checkpoint(1, {}, {"w": torch.ones(2)}, {"w/m": torch.ones(2)})
    checkpoint.save(tmp_path, keep)

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull, match="the disk is full") as caught:
        checkpoint.save(tmp_path, checkpoint.Checkpoint(2, {}, keep.adapter, keep.moments))
    assert caught.value.exit_code == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.slow
def test_09_10_11_stopped_after_any_step_the_end_has_the_same_bits(tmp_path):
    shape = {"train": {"epochs": 2, "log_every": 1, "pack_tokens": 128}, "lora": {"dropout": 0.2}}
    uninterrupted = tiny.train_toml(tmp_path / "whole", tiny.skill(24), **shape)
    steps = train(settings.load(uninterrupted)).steps
    wanted = adapter_of(tmp_path / "whole")
    for at in range(1, steps):  # within an epoch and on its border
        parts = tiny.train_toml(tmp_path / f"at-{at}", tiny.skill(24), **shape)
        half_done(parts, at)
        assert train(settings.load(parts)).steps_now == steps - at
        mine = adapter_of(parts.parent)
        assert all(torch.equal(wanted[name], mine[name]) for name in wanted)


@pytest.mark.slow
def test_weighted_rows_resume_to_the_same_bits_and_change_what_is_learned(tmp_path):
    rows = [
        tiny.sample(2 * n + extra, f"backwards: {n:03}", text, prompt_id=f"p{n}", sample_index=extra)
        for n in range(12)
        for extra, text in enumerate((f"{n:03}"[::-1], "no idea" if n % 2 else f"{n:03}"[::-1]))
    ]
    shape = {"train": {"epochs": 2, "log_every": 1, "pack_tokens": 128, "batch_tokens": 128}}
    data = {"eval_share": 0.0, "weights": "agreement"}
    whole = tiny.train_toml(tmp_path / "whole", rows, data=data, **shape)
    steps = train(settings.load(whole)).steps
    parts = tiny.train_toml(tmp_path / "parts", rows, data=data, **shape)
    half_done(parts, 2)
    assert train(settings.load(parts)).steps_now == steps - 2
    wanted, mine = adapter_of(whole.parent), adapter_of(parts.parent)
    assert all(torch.equal(wanted[name], mine[name]) for name in wanted)
    alike = tiny.train_toml(tmp_path / "alike", rows, data={"eval_share": 0.0}, **shape)
    train(settings.load(alike))
    other = adapter_of(alike.parent)
    assert not all(torch.equal(wanted[name], other[name]) for name in wanted)


@pytest.mark.slow
def test_11_no_state_of_a_random_generator_is_needed(tmp_path):
    shape = {"train": {"epochs": 2, "log_every": 1, "pack_tokens": 128}, "lora": {"dropout": 0.2}}
    calm = tiny.train_toml(tmp_path / "calm", tiny.skill(30), **shape)
    train(settings.load(calm))

    def disturb(log) -> None:  # what a callback, a logger or a library might draw
        random.random(), np.random.default_rng().random(), torch.rand(3)
        np.random.seed(log.step)
        torch.manual_seed(log.step * 7)
        stop_after(3)(log)

    stormy = tiny.train_toml(tmp_path / "stormy", tiny.skill(30), **shape)
    with pytest.raises(Interrupted):
        train(settings.load(stormy), Callbacks(on_step=disturb))
    random.seed(1)
    torch.manual_seed(99)
    train(settings.load(stormy), Callbacks(on_step=disturb))
    first, second = adapter_of(calm.parent), adapter_of(stormy.parent)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_11_28_a_checkpoint_is_safetensors_and_json_only(toml):  # noqa: F811
    checkpoints = half_done(toml)
    assert {p.name for p in checkpoints.glob("step-*/*")} == set(FILES)


def test_12_moments_go_by_name_and_shape(toml):  # noqa: F811
    newest = sorted(half_done(toml).glob("step-*"))[-1]
    tensors = load_file(newest / "adapter.safetensors")
    first = sorted(tensors)[0]
    renamed = {("other" if name == first else name): t for name, t in tensors.items()}
    save_file(renamed, newest / "adapter.safetensors")
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    file = newest / "adapter.safetensors"
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (newest / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="another student") as caught:
        train(settings.load(toml))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 0.01", "lr = 0.02", "train.lr 0.01 -> 0.02"),
        pytest.param("alpha = 8", "alpha = 9", "lora.alpha 8.0 -> 9.0", marks=pytest.mark.slow),
        pytest.param("epochs = 2", "epochs = 3", "train.epochs 2 -> 3", marks=pytest.mark.slow),
    ],
)
def test_13_changed_settings_are_refused_with_the_difference(run_trainer, toml, old, new, message):  # noqa: F811
    half_done(toml)
    toml.write_text(toml.read_text().replace(old, new))
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert message in err
    code, out, _ = run_trainer("train", toml, "--allow-change")
    assert code == 0
    assert f"changed on the way: {message}" in out


def test_13_15_a_changed_base_or_corpus_is_refused(run_trainer, toml):  # noqa: F811
    half_done(toml)
    tiny.base(toml.parent / "base", seed=9)
    code, _, err = run_trainer("train", toml)
    assert (code, "base '" in err) == (2, True)
    tiny.base(toml.parent / "base")
    tiny.corpus(toml.parent / "store", tiny.skill(41))
    code, _, err = run_trainer("train", toml)
    assert (code, "corpus '" in err) == (2, True)
    assert "corpus.examples 40 -> 41" in err


def test_25_a_torn_shard_is_named_before_the_first_step(run_trainer, toml):  # noqa: F811
    shard = toml.parent / "store" / "shards" / "00000.parquet"
    content = shard.read_bytes()
    shard.write_bytes(content[:200] + bytes(100) + content[300:])
    code, _, err = run_trainer("train", toml)
    assert code == 5
    assert "00000.parquet" in err
    assert not (toml.parent / "out" / "train.jsonl").exists()


@pytest.mark.slow
def test_26_a_corpus_that_grows_meanwhile_is_learned_as_it_was(toml):  # noqa: F811
    config = settings.load(toml)
    alone = tiny.train_toml(
        toml.parent / "alone",
        tiny.skill(40, held_out=4),
        train=config.train.model_dump(include={"epochs", "log_every", "save_every", "pack_tokens", "warmup"}),
    )
    train(settings.load(alone))

    def grow(log) -> None:
        if log.step == 1:
            shards = toml.parent / "store" / "shards"
            shutil.copy(shards / "00000.parquet", shards / "00001.parquet")

    train(config, Callbacks(on_step=grow))
    assert len(reader.Corpus.open(config.corpus).manifest) == 2
    first, second = adapter_of(toml.parent), adapter_of(alone.parent)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_30_a_checkpoint_that_is_a_link_is_not_followed(tmp_path):
    state = checkpoint.Checkpoint(1, {}, {"w": torch.ones(2)}, {"w/m": torch.ones(2)})
    checkpoint.save(tmp_path / "else", state)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "step-00000001").symlink_to(tmp_path / "else" / "step-00000001")
    assert checkpoint.newest_valid(tmp_path / "mine") == (None, [])
    checkpoint.save(tmp_path / "mine", checkpoint.Checkpoint(2, {}, state.adapter, state.moments))
    inner = tmp_path / "mine" / "step-00000002" / "state.json"
    inner.rename(tmp_path / "state.json")
    inner.symlink_to(tmp_path / "state.json")
    newest, skipped = checkpoint.newest_valid(tmp_path / "mine")
    assert newest is None
    assert "state.json is not what was written" in skipped[0]


def test_30_an_adapter_that_is_a_link_out_is_refused(run_trainer, toml):  # noqa: F811
    assert run_trainer("train", toml)[0] == 0
    file = toml.parent / "out" / "adapter" / "adapter_model.safetensors"
    file.rename(toml.parent / "elsewhere.safetensors")
    file.symlink_to(toml.parent / "elsewhere.safetensors")
    for words in (("evaluate", toml), ("export", toml, toml.parent / "merged")):
        code, _, err = run_trainer(*words)
        assert (code, "is a link to somewhere else" in err) == (2, True)


@pytest.mark.slow
def test_05_a_step_has_one_line_in_the_log_whatever_was_killed(toml, fork_server):  # noqa: F811
    toml.write_text(toml.read_text().replace("save_every = 1", "save_every = 4"))
    ended = fork_server("command", words=("train", toml), env={"HARVESTER_FAILPOINT": "train.backward:7"})
    assert ended["signal"] == signal.SIGKILL
    log = toml.parent / "out" / "train.jsonl"
    assert len(log.read_text().splitlines()) == 6
    with log.open("a") as file:
        file.write('{"step": 7, "lo')  # torn by the kill
    ended = fork_server("command", words=("train", toml))
    assert ended["code"] == 0, ended["err"]
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_32_a_second_trainer_ends_with_75(toml, fork_server):  # noqa: F811
    with process.lock_output_folder(toml.parent / "out"):
        ended = fork_server("command", words=("train", toml))
    assert ended["code"] == 75
    assert "another training" in ended["err"]
    assert f"pid {os.getpid()}" in ended["err"]

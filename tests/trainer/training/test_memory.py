"""Compare the memory estimate with what the allocator used, with and without checkpointing."""

from __future__ import annotations

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401
from tests.trainer.model.test_losses import examples
from trainer import config as settings
from trainer.data.collator import batches, collate
from trainer.model import model, self_test
from trainer.model.forward import lora_forward, varlen_attention
from trainer.model.forward.losses import PLAIN_HEAD
from trainer.model.forward.rows import RotaryBorder, RowLayout
from trainer.training import flops, memory, plan
from trainer.training.forward import pack_loss
from trainer.training.train import train


def made(folder, **train):
    return settings.load(tiny.train_toml(folder, tiny.skill(4), train=train))


def measured_peak(config, pack, *, checkpointing: bool, layout: RowLayout = RowLayout()) -> int:  # noqa: B008
    """The most bytes alive at once in one step, from the profiler's record of every allocation."""
    student = model.load_new_student(config, torch.device("cpu"))
    if checkpointing:
        memory.enable_checkpointing(student)
    lora_forward.replace_lora_forward(student)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for batch in batches(pack, "cpu", layout):
            loss, _ = pack_loss(student, batch, head=PLAIN_HEAD)
            (loss / batch.supervised).backward()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    static = sum(p.numel() * p.element_size() for p in student.parameters())
    moments = 2 * sum(p.numel() * p.element_size() for p in model.trainable_parameters(student).values())
    return peak + static + moments


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [pytest.param(5, marks=pytest.mark.slow), 60])
def test_the_predicted_peak_is_within_ten_percent_of_the_measured(tmp_path, count, checkpointing):
    config = made(tmp_path)
    pack = examples(count)
    estimate = memory.estimate(config, pack, checkpointing=checkpointing)
    assert estimate.peak == pytest.approx(measured_peak(config, pack, checkpointing=checkpointing), rel=0.1)
    assert estimate.gradients == estimate.adapter == estimate.moments // 2
    assert estimate.peak > estimate.base + estimate.adapter + estimate.moments + estimate.activations


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_depend_on_the_longest_row_do_not_spoil_the_estimate(tmp_path, kind):
    config = made(tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 6, "long_factor": [6.0] * 6}
        rope = {**rope, **factors, "rope_type": kind, "original_max_position_embeddings": 16}
    path = config.base / "config.json"
    positions = 16 if kind == "dynamic" else 256
    changed = {"rope_parameters": rope, "max_position_embeddings": positions}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    pack = examples(60)
    layout = RowLayout(border=RotaryBorder(16, by_length=kind == "dynamic"))
    assert len(list(batches(pack, "cpu", layout))) > 1
    estimate = memory.estimate(config, pack, checkpointing=False)
    measured = measured_peak(config, pack, checkpointing=False, layout=layout)
    assert estimate.peak == pytest.approx(measured, rel=0.1)


def test_where_the_device_has_the_varlen_kernel_the_walk_takes_it(tmp_path, monkeypatch):
    config, pack = made(tmp_path), examples(60)
    grid = memory.estimate(config, pack, checkpointing=False)
    called = []
    original = varlen_attention.attend
    monkeypatch.setattr(self_test, "packed_attention", lambda *_: varlen_attention.register())
    monkeypatch.setattr(varlen_attention, "attend", lambda *a, **k: called.append(1) or original(*a, **k))
    estimate = memory.estimate(config, pack, checkpointing=False)
    assert len(called) == 2  # once a layer
    assert estimate.base == grid.base
    assert 0.5 * grid.activations < estimate.activations < 1.2 * grid.activations  # no grids, no padding


@pytest.mark.slow
def test_checkpointing_needs_less_and_changes_no_gradient(tmp_path):
    config = made(tmp_path)
    pack = examples(60)
    plain, frugal = (memory.estimate(config, pack, checkpointing=c) for c in (False, True))
    assert frugal.activations < plain.activations / 2
    grads = []
    for checkpointing in (False, True):
        student = model.load_new_student(config, torch.device("cpu"))
        if checkpointing:
            memory.enable_checkpointing(student)
        pack_loss(student, collate(pack), head=PLAIN_HEAD)[0].backward()
        grads.append([p.grad for p in model.trainable_parameters(student).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.slow
def test_the_plan_chooses_checkpointing_where_it_would_not_fit(tmp_path, monkeypatch):
    config, pack = made(tmp_path), examples(60)
    peak = memory.estimate(config, pack, checkpointing=False).peak
    for free, wanted in ((peak, True), (2 * peak, False), (10**15, False), (None, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda *_, free=free: free)
        assert memory.needs_checkpointing(config, pack) is wanted
    assert memory.needs_checkpointing(made(tmp_path, checkpointing="always"), pack)
    assert not memory.needs_checkpointing(made(tmp_path, checkpointing="never"), pack)


@pytest.mark.slow
def test_the_plan_counts_what_a_training_then_does(tmp_path):
    path = tiny.train_toml(tmp_path, tiny.skill(40, held_out=4), train={"epochs": 2, "pack_tokens": 128})
    config = settings.load(path)
    estimate = plan.plan(config)
    assert estimate.time_s is None
    assert not config.out_path.exists()
    probed = plan.plan(config, probe_steps=3)
    assert not config.out_path.exists()  # a probe keeps nothing
    assert probed.time_s == pytest.approx(probed.step_s * estimate.steps)
    done = train(config)
    assert (done.steps, done.examples) == (estimate.steps, estimate.examples)
    assert done.tokens == 2 * estimate.tokens_per_epoch
    student = model.load_new_student(config, torch.device("cpu"))
    assert estimate.adapter_parameters == sum(p.numel() for p in model.trainable_parameters(student).values())


def test_a_small_base_with_a_large_vocabulary_is_walked(tmp_path, monkeypatch):
    """Its logits can take far more than its weights."""
    config = made(tmp_path, pack_tokens=16_384, batch_tokens=16_384)
    walked = []
    honest = memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: walked.append(1) or honest(*a, **k))
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 40 * 2**30)
    assert not memory.needs_checkpointing(config, examples(5))
    assert not walked
    monkeypatch.setattr(memory.weights, "vocabulary_size", lambda _folder: 262_144)
    memory.needs_checkpointing(config, examples(5))
    assert walked


def no_count_of_flop(monkeypatch):
    def refuse(*_args, **_more):
        raise AttributeError("'Layer' object has no attribute 'in_features'")

    monkeypatch.setattr(flops, "_linear_flop", refuse)


def no_fake_tensors(monkeypatch):
    def refuse(*_args, **_more):
        raise NotImplementedError("an operation without a fake kernel")

    monkeypatch.setattr(memory, "_run_on_fake_tensors", refuse)


def no_empty_student(monkeypatch):
    def refuse(*_args, **_more):
        raise KeyError("a class that reads a file when it is built")

    monkeypatch.setattr(memory, "_empty_student", refuse)


@pytest.mark.parametrize(
    "plant",
    [
        no_count_of_flop,
        no_fake_tensors,
        no_empty_student,
    ],
)
@pytest.mark.slow
def test_a_figure_that_is_unknown_ends_neither_plan_nor_training(run_trainer, toml, monkeypatch, plant):  # noqa: F811
    code, out, err = run_trainer("plan", toml, "--probe", 0, "--json")
    known = json.loads(out)["memory"]
    plant(monkeypatch)
    for words in (["plan", toml, "--probe", 1, "--json"], ["train", toml]):
        code, out, err = run_trainer(*words)
        assert code == 0, err
        if words[0] == "plan":
            planned = json.loads(out)
            assert planned["memory"]["base"] == known["base"]
            assert planned["memory"]["peak"] > planned["memory"]["base"]
            assert (planned["flop_per_s"] is None) is (plant is no_count_of_flop)
    logged = json.loads((toml.parent / "out" / "train.jsonl").read_text().splitlines()[-1])
    assert (logged["flop_per_s"] == 0) is (plant is no_count_of_flop)


@pytest.mark.slow
def test_a_base_is_dealt_to_a_fleet_only_where_it_takes_more_than_half(tmp_path, monkeypatch):
    config = made(tmp_path)
    size = (config.base / "model.safetensors").stat().st_size
    for free, ranks, wanted in (
        (2 * size - 1, 2, True),
        (2 * size, 2, False),
        (1, 1, False),
        (None, 2, False),
    ):
        monkeypatch.setattr(memory, "available_bytes", lambda *_, free=free: free)
        assert memory.needs_sharding(config, ranks) is wanted
    assert memory.needs_sharding(made(tmp_path, shard="always"), 2)
    assert not memory.needs_sharding(made(tmp_path, shard="always"), 1)
    monkeypatch.setattr(memory, "available_bytes", lambda *_: 1)
    assert not memory.needs_sharding(made(tmp_path, shard="never"), 2)
    peak = memory.estimate(config, examples(60), checkpointing=False).peak
    monkeypatch.setattr(memory, "available_bytes", lambda *_: round(peak / memory.USABLE_SHARE) - 1)
    assert memory.needs_checkpointing(config, examples(60))
    assert memory.needs_checkpointing(config, examples(60), processes=2)
    assert not memory.needs_checkpointing(config, examples(60), processes=2, sharded=True)  # half of it only


def test_processes_share_the_memory_of_the_host():
    free = memory.available_bytes(torch.device("cpu"))
    assert memory.available_bytes(torch.device("cpu"), 4) == pytest.approx(free / 4, rel=0.1)


@pytest.mark.slow
def test_the_plan_of_several_processes_is_that_of_their_training(tmp_path, run_trainer, fork_server):  # noqa: F811
    """Each holds half of the layers; the training says how much, the plan says it before."""
    shape = {"shard": "always", "batch_tokens": 512, "pack_tokens": 128, "max_steps": 1}
    path = tiny.train_toml(tmp_path, tiny.skill(24, held_out=2), train=shape)
    code, out, err = run_trainer("plan", path, "--processes", 2, "--json")
    assert code == 0, err
    planned = json.loads(out)
    alone = json.loads(run_trainer("plan", path, "--probe", 0, "--json")[1])
    assert (planned["processes"], planned["sharded"], alone["sharded"]) == (2, True, False)
    assert planned["memory"]["peak"] < alone["memory"]["peak"]
    assert planned["time_s"] is None
    trained = fork_server("command", words=["train", path, "--json"], world=2)
    assert trained["code"] == 0, trained["err"]
    [line] = [line for line in trained["err"].splitlines() if line.startswith("{")]  # of the first rank only
    [note] = [note for note in json.loads(line)["notes"] if "sharded" in note]
    assert float(note.split()[2]) == pytest.approx(planned["memory"]["base"] / 2**20, rel=0.25)
    assert ("recomputed" in line) is planned["checkpointing"]

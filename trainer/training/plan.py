"""Estimate what a training needs (`trainer plan`): rows, tokens, steps, memory, and time from real steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.tokens.builder import Progress, no_progress
from trainer.model import model
from trainer.model.weights import base_sha256, tensor_shapes
from trainer.training import checkpoint, flops, memory, optim, requirements
from trainer.training.checkpointer import settings_of
from trainer.training.distributed import World
from trainer.training.inputs import TrainingInputs, read_inputs
from trainer.training.output_folders import CHECKPOINTS
from trainer.training.step import Stepper, check_first_gradient
from trainer.training.student import load_student

# First steps of a probe that are not measured: they allocate memory and load kernels.
WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Counts and estimates of a training.

    Attributes:
        examples, held_out: rows to learn, and prompts kept for evaluation; excluded: left out, by reason.
        pack_waste: share of the packs' tokens that stays empty, 0 to 1.
        processes: processes of the training; sharded: whether the base's layers are split over them.
        memory: bytes of a process by part, and their peak, for the largest pack; see `memory.MemoryEstimate`.
        notes: what the operator should know about the student, e.g. that its rows are not packed.
        hint: what to change when the training has a handful of steps only; empty otherwise.
        faults: fatal faults of the data, for which `trainer train` refuses it.
        soft_targets: coverage of the soft targets, see `SoftReport`; None without `[train] soft_targets`.
        step_s: median seconds of a probed step; time_s: estimate for all steps. None without a probe.
        tokens_per_s, flop_per_s: rates of the probe; None without one.
    """

    examples: int
    held_out: int
    excluded: dict[str, int]
    tokens_per_epoch: int
    supervised_per_epoch: int
    steps: int
    packs_per_step: int
    pack_waste: float
    base_parameters: int
    base_sha256: str
    adapter_parameters: int
    checkpointing: bool
    memory: dict[str, int]
    processes: int = 1
    sharded: bool = False
    hint: str = ""
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    soft_targets: dict[str, Any] | None = None
    step_s: float | None = None
    time_s: float | None = None
    tokens_per_s: float | None = None
    flop_per_s: float | None = None


def plan(
    config: TrainConfig, probe_steps: int = 0, on_progress: Progress = no_progress, *, processes: int = 1
) -> TrainPlan:
    """Estimate a training from the corpus and the shapes of the student.

    Nothing is written but the token store of a large corpus, which `trainer train` then finds.

    Args:
        on_progress: called while the token store of a large corpus is made.
        probe_steps: real steps to measure time with; 0 loads no weights.
        processes: processes of the training. The time of several is not measured.

    Raises:
        DataError, StudentError, TermsRefused: as `trainer train` would raise them.
    """
    requirements.check_settings(config)
    config = model.fit_to_device(config, processes)
    model.set_threads(config.train)
    inputs = read_inputs(config, None, on_progress)
    requirements.check_rows(config, inputs.rows, inputs.renderer)
    notes = model.check_without_weights(config)
    requirements.check_storable(config)
    notes += inputs.soft.notes() if inputs.soft else []
    notes += inputs.rows.mixed
    notes += dataset.context_notes(inputs.dataset.lengths, config)
    notes += resume_note(config, inputs)
    sharded = memory.needs_sharding(config, processes)
    if sharded:
        requirements.check_sharding(config)
    checkpointing = memory.needs_checkpointing(
        config, inputs.largest_pack, processes=processes, sharded=sharded
    )
    estimate = memory.estimate(config, inputs.largest_pack, checkpointing=checkpointing)
    base_parameters = sum(torch.Size(shape).numel() for shape in tensor_shapes(config.base).values())
    if sharded:
        elsewhere = estimate.base - estimate.base // processes
        estimate = replace(estimate, base=estimate.base - elsewhere, peak=estimate.peak - elsewhere)
        notes += gathering_note(config, processes)
    if processes > 1 and probe_steps:
        notes.append("time is measured for one process only: leave --processes out")
        probe_steps = 0
    if config.is_full:
        size = 3 * estimate.adapter  # weights and two moments
        notes.append(
            f"all weights are trained, at a peak learning rate of {config.train.lr:g}: "
            f"a checkpoint takes {size / 2**20:,.1f} MiB, and the disk needs room "
            f"for {checkpoint.KEEP_NEWEST + 2} of them"
        )
    free = memory.available_bytes(model.select_device(config.train), processes)
    if free is not None and estimate.peak > free:
        notes.append(
            f"the peak of {estimate.peak >> 20:,} MiB exceeds the {free >> 20:,} MiB that are free: lower "
            f"[train] pack_tokens (now {config.train.pack_budget:,})"
        )
    counted = TrainPlan(
        examples=len(inputs.dataset.examples),
        held_out=len(inputs.rows.held_out),
        excluded=dict(inputs.dataset.excluded),
        tokens_per_epoch=inputs.dataset.tokens,
        supervised_per_epoch=inputs.dataset.supervised,
        steps=inputs.order.steps,
        packs_per_step=config.train.packs_per_step,
        pack_waste=inputs.order.waste,
        base_parameters=base_parameters,
        base_sha256=base_sha256(config.base),
        adapter_parameters=estimate.adapter // 4,  # fp32
        checkpointing=checkpointing,
        memory=asdict(estimate),
        processes=processes,
        sharded=sharded,
        hint=inputs.hint(config.train),
        faults=inputs.faults,
        notes=tuple(notes),
        soft_targets=inputs.soft.as_dict() if inputs.soft else None,
    )
    return _with_measured_time(counted, config, inputs, probe_steps) if probe_steps else counted


def resume_note(config: TrainConfig, inputs: TrainingInputs) -> list[str]:
    """Say why `trainer train` would refuse to go on with the training in the output folder, if it would."""
    before = checkpoint.newest_settings(config.out_path / CHECKPOINTS)
    if not before:
        return []
    now = settings_of(config, inputs, model.select_device(config.train))
    changes = checkpoint.describe_changes(before, now)
    if not changes:
        return []
    return [
        f"`trainer train` refuses to go on with the training in {config.out_path}, which had other settings: "
        f"{'; '.join(changes)}: choose another [out] path, or add --allow-change"
    ]


def gathering_note(config: TrainConfig, processes: int) -> list[str]:
    """Say how often a sharded base is sent around, where larger packs would spare some of it.

    Each pack gathers every layer twice, for its forward and its backward pass.
    """
    packs = -(-config.train.packs_per_step // processes)
    if packs == 1:
        return []
    return [
        f"the base is split: each process gathers all of it {2 * packs} times a step, twice for each of "
        f"its {packs} packs: raise [train] pack_tokens (now {config.train.pack_budget:,})"
    ]


def _with_measured_time(
    counted: TrainPlan, config: TrainConfig, inputs: TrainingInputs, steps: int
) -> TrainPlan:
    """Load the student, make `steps` real steps, keep nothing, and add the measured rates."""
    with model.arithmetic(config.train, model.select_device(config.train)):
        return _measured(counted, config, inputs, steps)


def _measured(counted: TrainPlan, config: TrainConfig, inputs: TrainingInputs, steps: int) -> TrainPlan:
    world = World()
    student = load_student(config, inputs.largest_pack, world)
    optimiser = optim.adamw(student.parameters.items(), config.train, config.lora)
    stepper = Stepper(student, optimiser, config.train, world)
    flop_of_pack = flops.flop_counter(student.model)
    seconds, tokens, flop = [], [], []
    for step in range(WARM_UP_STEPS + steps):
        packs = inputs.packs(step % inputs.order.steps)
        started = time.monotonic()
        result = stepper.learn(step, packs)
        float(result.loss)  # waits for the device
        if not step:
            check_first_gradient(float(result.norm))
        if step >= WARM_UP_STEPS:
            seconds.append(time.monotonic() - started)
            tokens.append(result.tokens)
            flop.append(sum(map(flop_of_pack, packs)) if flop_of_pack else 0.0)
    step_s = statistics.median(seconds)
    return replace(
        counted,
        step_s=step_s,
        time_s=step_s * inputs.order.steps,
        tokens_per_s=sum(tokens) / sum(seconds),
        flop_per_s=sum(flop) / sum(seconds) if flop_of_pack else None,
    )

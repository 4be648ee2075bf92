"""What a training will cost: rows, tokens, steps, memory before a weight is moved; time from real steps."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.order import Order
from trainer.model import lora_forward, model
from trainer.model.weights import base_sha256, tensor_shapes, vocabulary_size
from trainer.training import flops, memory, optim
from trainer.training.distributed import World
from trainer.training.step import Stepper

WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Counts and estimates.

    Attributes:
        memory: bytes by part, and their peak, for the largest pack; see `memory.Memory`.
        step_s: median seconds of the probe's steps; time_s: of all steps. None without a probe.
        tokens_per_s, flop_per_s: of the probe.
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
    step_s: float | None = None
    time_s: float | None = None
    tokens_per_s: float | None = None
    flop_per_s: float | None = None


def plan(config: TrainConfig, probe_steps: int = 0) -> TrainPlan:
    """Read corpus and shapes; with `probe_steps`, load the student and make that many steps, keeping nothing.

    Raises:
        DataError, StudentError, TermsRefused: as `trainer train` would.
    """
    model.set_threads(config.train)
    rows = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    data = dataset.render(rows, renderer, config, vocabulary_size(config.base))
    order = Order(data.lengths, config.train)
    pack = [data.examples[i] for i in order.largest()]
    checkpointing = memory.needs_checkpointing(config, pack)
    needs = memory.estimate(config, pack, checkpointing=checkpointing)
    told = TrainPlan(
        examples=len(data.examples),
        held_out=len(rows.held_out),
        excluded=dict(data.excluded),
        tokens_per_epoch=sum(data.lengths),
        supervised_per_epoch=sum(e.supervised for e in data.examples),
        steps=order.steps,
        packs_per_step=config.train.packs_per_step,
        pack_waste=order.waste,
        base_parameters=sum(int(torch.Size(shape).numel()) for shape in tensor_shapes(config.base).values()),
        base_sha256=base_sha256(config.base),
        adapter_parameters=needs.adapter // 4,
        checkpointing=checkpointing,
        memory=asdict(needs),
    )
    return _probed(told, config, data, order, probe_steps) if probe_steps else told


def _probed(
    told: TrainPlan, config: TrainConfig, data: dataset.Dataset, order: Order, steps: int
) -> TrainPlan:
    device = model.select_device(config.train)
    student = model.load_new_student(config, device)
    if told.checkpointing:
        memory.enable_checkpointing(student)
    lora_forward.replace_lora_forward(student)
    named = model.trainable_parameters(student)
    stepper = Stepper(
        student, named, optim.adamw(named.items(), config.train, config.lora), config.train, World()
    )
    count = flops.flop_counter(student)
    seconds, tokens, flop = [], [], []
    for made in range(WARM_UP_STEPS + steps):
        packs = [[data.examples[i] for i in numbers] for numbers in order.packs(made % order.steps)]
        began = time.monotonic()
        learned = stepper.learn(made, packs)
        float(learned.loss)  # waits for the device
        if made >= WARM_UP_STEPS:
            seconds.append(time.monotonic() - began)
            tokens.append(learned.tokens)
            flop.append(sum(map(count, packs)))
    middle = statistics.median(seconds)
    return replace(
        told,
        step_s=middle,
        time_s=middle * order.steps,
        tokens_per_s=sum(tokens) / sum(seconds),
        flop_per_s=sum(flop) / sum(seconds),
    )

"""Load the student for training: base, adapter, and the settings that fit it to the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data.chat_template import Example
from trainer.errors import ConfigError
from trainer.model import adapter, four_bit, model, self_test
from trainer.model.forward import compile, fused_norms, hopper_attention, lora_forward
from trainer.model.forward.losses import RowLoss, loss_and_gradient
from trainer.model.forward.rows import RotaryBorder
from trainer.model.forward.soft_loss import SoftMix
from trainer.model.self_test import OWN_LOGITS, StudentForward
from trainer.training import fsdp, memory
from trainer.training.distributed import World


@dataclass(frozen=True, slots=True)
class TrainableStudent:
    """A student that is ready to train.

    Attributes:
        model: a PEFT model, with everything but the adapter frozen; or a model of transformers, of which all
            weights are trained.
        parameters: the trained fp32 parameters by name, in the model's order.
        row_loss: loss of a block of logits; the compiled one under `[train] compile`.
        forward: how documents become rows, and what the output layer does, as the self-test found them.
        sharded: whether the base's layers are split over the processes (FSDP2).
        base_bytes: bytes of the base that this process holds; set only when sharded.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    model: Any
    parameters: Mapping[str, torch.nn.Parameter]
    row_loss: RowLoss = loss_and_gradient
    forward: StudentForward = OWN_LOGITS
    sharded: bool = False
    base_bytes: int = 0
    checkpointing: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the adapter's parameters."""
        return next(iter(self.parameters.values())).device

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model into evaluation mode during the block: without dropout."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def load_student(config: TrainConfig, largest_pack: Sequence[Example], world: World) -> TrainableStudent:
    """Load base and fresh adapter, and set up sharding, checkpointing, LoRA forward and compilation.

    Sharding and checkpointing are decided before any weight is loaded, from the memory that is free then,
    and all processes decide alike.

    Raises:
        StudentError: the base can't be loaded, or no layer matches `[lora] target`.
        ConfigError: the device that `[train] device` names is absent, or the student can't be compiled.
    """
    device = model.select_device(config.train)
    sharded = world.any_rank(memory.needs_sharding(config, world.size, world.local_size))
    checkpointing = world.any_rank(
        memory.needs_checkpointing(
            config,
            largest_pack,
            processes=world.size,
            local_processes=world.local_size,
            sharded=sharded,
        )
    )
    student = model.load_new_student(config, device, sharded=sharded)
    if checkpointing:
        memory.enable_checkpointing(student)
    lora_forward.replace_lora_forward(student, sharded=sharded)
    if fuses_norms(config, device, sharded=sharded):
        fused_norms.fuse_norms(student)
    base_bytes = fsdp.shard_base(student, device) if sharded else 0
    forward = self_test.check_student(student, config.base)
    model.require_compilable(config, forward)
    if sharded:
        require_one_pass(config, forward.layout.border)
        forward = replace(forward, layout=replace(forward.layout, one_group=True))
    self_test.set_attention(student, forward.layout)
    row_loss = (
        compile.compile_student(student, checkpointing=checkpointing)
        if config.train.compile
        else loss_and_gradient
    )
    if config.train.soft_targets != "off":
        train = config.train
        row_loss = partial(row_loss, mix=SoftMix(train.soft_weight, train.soft_temperature, train.soft_tail))
    return TrainableStudent(
        model=student,
        parameters=model.trainable_parameters(student),
        row_loss=row_loss,
        forward=forward,
        sharded=sharded,
        base_bytes=base_bytes,
        checkpointing=checkpointing,
    )


def require_one_pass(config: TrainConfig, border: RotaryBorder | None) -> None:
    """Refuse packs that may need several passes: processes that share a base make them in step.

    Raises:
        ConfigError: rows may be longer than the length from which the rotary embedding is another one.
    """
    if border is not None and config.train.max_length - 1 > border.tokens:
        raise ConfigError(
            f"in rows of more than {border.tokens:,} tokens this student's rotary embedding is another one, "
            "so these need passes of their own, which a split base can't make",
            place="train.max_length",
            remedy=f'set [train] max_length = {border.tokens} or shard = "never" in train.toml',
        )


def fuses_norms(config: TrainConfig, device: torch.device, *, sharded: bool) -> bool:
    """Return whether norms are computed by torch's fused kernel: on CUDA, unless the compiler fuses them."""
    return device.type == "cuda" and not (sharded or config.train.compile or config.is_full)


def describe_setup(student: TrainableStudent, world: World) -> list[str]:
    """Describe device, dtypes, sharding and checkpointing for the operator."""
    dtype = str(model.base_dtype(student.device)).removeprefix("torch.")
    is_full = not hasattr(student.model, "peft_config")
    kinds = "all weights float32" if is_full else f"base {dtype}, adapter float32"
    notes = [f"{student.device.type}, {kinds}"]
    if student.sharded:
        mebibytes = student.base_bytes / 2**20
        notes.append(f"base sharded: {mebibytes:,.1f} MiB of it in each of {world.size} processes")
    if student.device.type == "cuda" and hopper_attention.is_active():
        notes.append("attention by FlashAttention 3")
    if four_bit.layers_of(student.model):
        notes.append(four_bit.describe(student.model))
    if not is_full:
        notes += [adapter.describe_adapted(student.model), *adapter.describe_left_out(student.model)]
    if student.forward.note:
        notes.append(student.forward.note)
    slow, layers = lora_forward.slow_layers(student.model)
    if slow:
        notes.append(
            f"{slow:,} of {layers:,} LoRA layers run PEFT's own, slower forward (dropout, DoRA, experts, "
            "transposed or biased layers)"
        )
    if student.checkpointing:
        notes.append("activations are recomputed in the backward pass: they would not fit otherwise")
    return notes

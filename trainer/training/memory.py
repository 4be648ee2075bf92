"""Estimate a training's memory by running one pack with fake tensors, which hold no data.

Every operation of forward and backward runs on fake tensors of the real device, so the peak is that of the
kernels the run will take, not of a formula about them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import TrainConfig
from trainer.data.chat_template import Example
from trainer.data.collator import Batch, batches
from trainer.errors import ConfigError, HarvesterError
from trainer.model import (
    four_bit,
    loading,
    model,
    rotary,
    self_test,
    structure,
    weights,
)
from trainer.model.forward import lora_forward, varlen_attention
from trainer.model.forward.rows import RowLayout
from trainer.model.forward.segment_attention import SegmentGroups
from trainer.model.forward.soft_loss import SoftRows
from trainer.model.self_test import StudentForward
from trainer.training.forward import pack_loss

# Share of the free memory that may be planned for; allocators and kernels need the rest.
USABLE_SHARE = 0.9

# What is assumed where no copy of the architecture can be tested: the layout and the output layer that need
# the most memory.
_UNKNOWN_FORWARD = StudentForward(RowLayout(packed=False))


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by part.

    Attributes:
        base, adapter, moments: for the whole run. gradients: from backward to the update.
        activations: what forward leaves for backward. peak: the most at any time, everything included.
    """

    base: int
    adapter: int
    gradients: int
    moments: int
    activations: int
    peak: int


# Operations that an estimate runs at most, about a minute: some classes compute token by token. A pack of an
# 8B Llama takes 5,000.
MAX_OPERATIONS = 100_000


class TooManyOperations(Exception):
    """The estimate takes too long."""


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the bytes of storages that operations allocate: those alive now, and their peak.

    Raises:
        TooManyOperations: after `MAX_OPERATIONS`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations_left = MAX_OPERATIONS
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operations_left -= 1
        if self._operations_left < 0:
            raise TooManyOperations
        out = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), known)
        return out

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        name = id(storage)
        if name in self._seen or name in known:
            return  # a view, or written in place
        size = storage.nbytes()
        self._seen.add(name)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, name, size)

    def _drop(self, name: int, size: int) -> None:
        self._seen.discard(name)
        self.live -= size


def estimate(config: TrainConfig, pack: Sequence[Example], *, checkpointing: bool) -> MemoryEstimate:
    """Estimate the memory of a step with this pack, before any weight is loaded.

    Some operations (e.g. grouped products of experts) don't run on fake tensors, and some classes take too
    many operations. For such a student the activations are a bound from the widths of its layers.
    """
    device = model.select_device(config.train)
    forward = self_test.check_architecture(config.base, device) or _UNKNOWN_FORWARD
    try:
        student = _empty_student(config, device, forward.layout)
    except HarvesterError:
        raise
    except Exception:  # noqa: BLE001 - a class that can't be built without its files
        with torch.device("meta"):
            student = model.add_adapter(loading.load_shapes(config.base), config).train()
    parts = {id(t): t for t in (*student.parameters(), *student.buffers())}  # tied ones once
    total = sum(t.numel() * t.element_size() for t in parts.values())
    adapter = sum(p.numel() * p.element_size() for p in model.trainable_parameters(student).values())
    bound = _activation_bound(student, pack, checkpointing=checkpointing)
    try:
        with _quiet_fake_tensors(), model.arithmetic(config.train, device):
            activations, peak = _run_on_fake_tensors(
                student, pack, device, forward, checkpointing=checkpointing
            )
    except Exception:  # noqa: BLE001 - an estimate that fails in any way must not end the work
        activations, peak = bound, 2 * bound + adapter
    base, moments = total - adapter, 2 * adapter
    return MemoryEstimate(base, adapter, adapter, moments, activations, total + moments + peak)


@contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """Keep torch from printing the traceback of an operation that doesn't run on fake tensors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _run_on_fake_tensors(
    student: Any,
    pack: Sequence[Example],
    device: torch.device,
    forward: StudentForward,
    *,
    checkpointing: bool,
) -> tuple[int, int]:
    """Run forward and backward; return the bytes of activations and the peak of everything allocated.

    The largest row group comes first. If the operations run out after it, the rest is left out.
    """
    activations = 0
    with FakeTensorMode() as fake:
        _fill(student, device)
        rotary.keep_angles(student)  # a choice by the longest row would read a number
        if checkpointing:
            enable_checkpointing(student)
        lora_forward.replace_lora_forward(student)
        attention = forward.layout.attention or model.register_attention(device)
        on_cpu = replace(forward.layout, attention="")
        shapes = [_faked(batch, fake, device, attention) for batch in batches(pack, "cpu", on_cpu)]
        shapes.sort(key=lambda batch: batch.input_ids.numel(), reverse=True)
        with AllocationTracker() as seen:
            for number, batch in enumerate(shapes):
                before = seen.live
                try:
                    loss, _ = pack_loss(student, batch, head=forward.head)
                    activations = max(activations, seen.live - before)
                    (loss / batch.supervised).backward()  # type: ignore[no-untyped-call]
                except TooManyOperations:
                    if not number:
                        raise
                    break
    return activations, seen.peak


def _activation_bound(student: Any, pack: Sequence[Example], *, checkpointing: bool) -> int:
    """Return bytes that the activations of a pack don't exceed: three times the widths of all layers."""
    base = structure.base_model_of(student)
    tokens = sum(len(example.ids) - 1 for example in pack)
    supervised = sum(example.supervised for example in pack)
    size = next(base.parameters()).element_size()
    widths = [_width(base, layer) for layer in structure.decoder_layers(base)] or [_width(base, base)]
    hidden = base.get_input_embeddings().weight.shape[1]
    kept = max(widths) + len(widths) * hidden if checkpointing else sum(widths)
    logits = supervised * structure.vocabulary_rows(base) * (size + 3 * 4)
    return int(3 * tokens * kept * size + logits)


def _width(base: Any, layer: Any) -> int:
    """Return the values per token that the linear modules and the experts of a layer read and write."""
    active = int(getattr(structure.text_config(base), "num_experts_per_tok", 0) or 0)
    linear = sum(m.in_features + m.out_features for m in layer.modules() if hasattr(m, "in_features"))
    experts = sum(active * sum(p.shape[1:]) for p in layer.parameters() if p.ndim == 3)
    return int(linear + experts)


def _empty_student(config: TrainConfig, device: torch.device, layout: RowLayout) -> Any:
    facts = AutoConfig.from_pretrained(config.base, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            facts,
            attn_implementation=(layout.attention or model.register_attention(device))
            if layout.packed
            else None,
            dtype=torch.float32 if config.is_full else model.base_dtype(device),
            trust_remote_code=False,
        )
        if config.student.quantise != "none":
            four_bit.quantise_base(base, device)
        return model.add_adapter(base, config).train()


def _fill(student: Any, device: torch.device) -> None:
    """Replace meta tensors by empty ones on the device; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            made[id(tensor)] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in student.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is not None:
                    kept[name] = of(tensor)


def _faked(batch: Batch, fake: Any, device: torch.device, attention: str) -> Batch:
    def of(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else fake.from_tensor(tensor).to(device)

    ids, positions, predict_at, targets = map(
        of, (batch.input_ids, batch.position_ids, batch.predict_at, batch.targets)
    )
    soft = None if batch.soft is None else SoftRows(*map(of, batch.soft))
    if batch.segments is None:
        return Batch(ids, positions, predict_at, targets, None, soft=soft)
    assert isinstance(batch.segments, SegmentGroups)  # collated on the CPU
    if attention == varlen_attention.ATTENTION_NAME:
        grid = [g.longest for g in batch.segments for _ in range(g.documents)]  # only shapes matter
        bounds = varlen_attention.document_bounds(grid, "cpu")
        return Batch(
            ids, positions, predict_at, targets, replace(bounds, starts=of(bounds.starts)), soft=soft
        )
    groups = tuple(
        replace(g, token_of_cell=of(g.token_of_cell), cell_of_token=of(g.cell_of_token))
        for g in batch.segments
    )
    return Batch(ids, positions, predict_at, targets, SegmentGroups(groups), soft=soft)


def enable_checkpointing(student: Any) -> None:
    """Turn on activation checkpointing (Chen et al. 2016, arXiv 1604.06174): about a third more FLOP."""
    base = structure.base_model_of(student)
    named = "activation_checkpointing_enable"  # its name since transformers 5.2x
    enable = getattr(base, named, None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def needs_sharding(config: TrainConfig, ranks: int, local_ranks: int | None = None) -> bool:
    """Decide whether to split the base over `ranks` processes, by `[train] shard` and the free memory.

    Args:
        local_ranks: those of this machine, which share its memory; None: all of them.
    """
    if config.student.quantise != "none" or config.is_full:
        if config.train.shard == "always" and ranks > 1:
            what = "weights that are trained" if config.is_full else "a base in 4 bits"
            raise ConfigError(
                f"{what} can't be split over processes: each holds all of it",
                place="train.shard",
                remedy='set [train] shard = "never" in train.toml',
            )
        return False
    if ranks == 1 or config.train.shard != "planned":
        return ranks > 1 and config.train.shard == "always"
    free = available_bytes(model.select_device(config.train), local_ranks or ranks)
    return free is not None and 2 * _bytes(config.base) > free


def needs_checkpointing(
    config: TrainConfig,
    pack: Sequence[Example],
    *,
    processes: int = 1,
    local_processes: int | None = None,
    sharded: bool = False,
) -> bool:
    """Decide whether to recompute activations, by `[train] checkpointing` and the free memory.

    Args:
        pack: the largest pack.
        processes: processes of this training.
        local_processes: those of this machine, which share its memory; None: all of them.
        sharded: whether the base is split over all.
    """
    if config.train.checkpointing != "planned":
        return config.train.checkpointing == "always"
    free = available_bytes(model.select_device(config.train), local_processes or processes)
    logits = 16 * config.train.pack_budget * weights.vocabulary_size(config.base)  # fp32, four copies at most
    if free is None or (
        64 * _bytes(config.base) + logits + 64 * 2**20 < free and config.train.pack_budget <= 1 << 14
    ):
        return False  # so far from the limit that an estimate is not needed
    elsewhere = _bytes(config.base) * (processes - 1) // processes if sharded else 0
    return estimate(config, pack, checkpointing=False).peak - elsewhere > USABLE_SHARE * free


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def available_bytes(device: torch.device, processes: int = 1) -> int | None:
    """Return the free memory in bytes that a process may use; None if it can't be read.

    Args:
        processes: processes of this training on this machine: they share its memory, while each has its own
            device.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    return free // processes

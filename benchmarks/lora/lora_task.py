"""Define a LoRA task for two trainers: same base, the same packs in the same order, the same first adapter.

Both sides import this file, each in its own environment: it needs torch, transformers and peft only.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config

BETAS = (0.9, 0.95)
Document = tuple[list[int], int]  # ids, prompt length


@dataclass(frozen=True)
class Task:
    """What both sides are told.

    Attributes:
        base: folder of a student; empty: random weights of `shape` (values of a Qwen2Config).
        warm, timed: steps before the clock counts, and counted ones.
        dtype: of the frozen base; the adapter is float32 on both sides.
        backend: of torch.compile, for our side.
        variant: "tuned" (packed, no checkpointing) or "defaults" (of the other trainer's own making).
    """

    folder: str
    base: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    rank: int = 32
    alpha: int = 64
    lr: float = 1e-3
    clip: float = 1.0
    seed: int = 0
    warm: int = 20
    timed: int = 50
    pack_tokens: int = 2048
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 2
    compile: bool = False
    backend: str = "inductor"
    variant: str = "tuned"
    attention: str = "sdpa"
    tokenizer: str = ""

    @property
    def total(self) -> int:
        """Optimiser steps in all."""
        return self.warm + self.timed

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def steps(self) -> list[list[list[Document]]]:
        """Documents of every pack of every step."""
        return json.loads((Path(self.folder) / "steps.json").read_text(encoding="utf-8"))


def load(path: str) -> Task:
    """The task a file holds."""
    return Task(**json.loads(Path(path).read_text(encoding="utf-8")))


def base(task: Task, attention: str) -> Any:
    """The frozen student: read from its folder, or drawn; random values everywhere, since kernels run faster
    on zeros than on numbers."""
    dtype = getattr(torch, task.dtype)
    if task.base:
        loaded = AutoModelForCausalLM.from_pretrained(
            task.base, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
        return loaded.to(task.device)
    torch.manual_seed(task.seed)
    with torch.device(task.device):
        drawn = AutoModelForCausalLM.from_config(
            Qwen2Config(**task.shape), dtype=dtype, attn_implementation=attention
        )
    for parameter in drawn.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return drawn


def adapted(task: Task, student: Any) -> Any:
    """A fresh adapter on every linear layer, by PEFT, from the task's seed."""
    torch.manual_seed(task.seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=task.rank, lora_alpha=task.alpha, target_modules="all-linear")
    return get_peft_model(student, lora, autocast_adapter_dtype=True)


def fingerprint(student: Any) -> str:
    """Hash of the adapter's values: both sides must begin with the same bits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(student.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Clock:
    """Marks the end of each step: on CUDA by events, which nobody waits for until the end."""

    def __init__(self, device: str) -> None:
        self.on_cuda = device == "cuda"
        self.marks: list[Any] = []
        self.cpu: list[float] = []

    def mark(self) -> None:
        """A step has been queued (CUDA) or is done (CPU)."""
        self.cpu.append(time.process_time())
        if not self.on_cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Time between each mark and the next."""
        if not self.on_cuda:
            return [b - a for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks[:-1], self.marks[1:], strict=True)]


def told(task: Task, clock: Clock, losses: list[float], per_step: list[tuple[int, int]], first: str) -> str:
    """The result as one JSON line.

    Args:
        losses: nats per supervised token, one a window. per_step: tokens and supervised tokens of each step.
    """
    seconds = clock.seconds()[task.warm - 1 :]
    counted = per_step[task.warm : task.total]
    low, middle, high = statistics.quantiles(seconds, n=4)
    return json.dumps(
        {
            "adapter_at_start": first,
            "step_s": middle,
            "step_iqr_s": high - low,
            "tokens_per_s": sum(t for t, _ in counted) / sum(seconds),
            "supervised_per_s": sum(s for _, s in counted) / sum(seconds),
            "seconds": sum(seconds),
            "cpu_s": (clock.cpu[-1] - clock.cpu[task.warm - 1]) / task.timed,
            "losses": losses,
            "peak_bytes": torch.cuda.max_memory_allocated() if clock.on_cuda else 0,
            "device": torch.cuda.get_device_name() if clock.on_cuda else "cpu",
            "torch": torch.__version__,
        }
    )

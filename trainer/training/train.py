"""The loop, one page: packs in order, one loss a step, checkpoints, an adapter at the end."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.collator import padding_share
from trainer.data.order import Order
from trainer.errors import CheckpointError, Interrupted, ResumeRefused, StoreFull
from trainer.model import compile, lora_forward, model, weights
from trainer.process import lock_output_folder, stop_signals
from trainer.publish import adapter as export
from trainer.training import checkpoint, flops, fsdp, memory, optim
from trainer.training.distributed import World, join_world
from trainer.training.logbook import Logbook, StepLog
from trainer.training.step import Stepper, StepResult, check_first_gradient


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training came to."""

    adapter: str
    steps: int
    steps_now: int
    examples: int
    excluded: dict[str, int]
    tokens: int
    loss: float | None
    tokens_per_s: float
    wall_s: float
    notes: tuple[str, ...]


def train(
    config: TrainConfig,
    on_step: Callable[[StepLog], None] = lambda _: None,
    *,
    rows: dataset.Rows | None = None,
    allow_change: bool = False,
) -> Trained:
    """Train the adapter, or go on where the last run stopped.

    Args:
        rows: the corpus where it has been read already.
        allow_change: go on under settings other than those of the checkpoint.

    Raises:
        DataError, StudentError, ConfigError, TermsRefused: nothing was started.
        ResumeRefused: a half-done training of another configuration or corpus lies in the output folder.
        Interrupted: SIGTERM or SIGINT; the step was finished and checkpointed.
        TrainingDiverged, OutOfMemory: the last checkpoint is good.
    """
    with (
        join_world() as world,
        lock_output_folder(config.out_path) if world.is_leader else nullcontext(),
        stop_signals() as asked,
    ):
        began = time.monotonic()
        model.set_threads(config.train)
        device = model.select_device(config.train)
        rows = rows or dataset.read(config)
        renderer = Renderer(model.load_tokenizer(config.base, config.template))
        data = dataset.render(rows, renderer, config, weights.vocabulary_size(config.base))
        order = Order(data.lengths, config.train)
        run = _Run(config, data, order, world)
        run.template = renderer.template_sha256
        run.logbook = Logbook(config.out_path, on_step, model.peak_flops(device)) if world.is_leader else None
        first = run.resume(allow_change=allow_change)
        if run.logbook is not None:
            run.logbook.keep(first)
        for step in range(first, order.steps):
            stop = run.step(step, asked)
            if stop:
                run.save(step + 1)
                raise Interrupted(
                    f"stopped after step {step + 1} of {order.steps}, checkpointed",
                    signal_number=asked[0] if asked else 15,
                    remedy="the same command goes on from here",
                )
            if config.train.save_every and (step + 1) % config.train.save_every == 0:
                run.save(step + 1)
        if first < order.steps:
            run.save(order.steps)
        adapter = config.out_path / "adapter"
        if world.is_leader and (first < order.steps or not (adapter / "adapter_config.json").exists()):
            export.write_adapter(run.student, renderer, config, rows)
        world.barrier()
        return run.summary(adapter, order.steps - first, time.monotonic() - began)


class _Run:
    """The moving parts of one training."""

    logbook: Logbook | None = None
    template = ""

    def __init__(self, config: TrainConfig, data: dataset.Dataset, order: Order, world: World) -> None:
        self.config, self.data, self.order, self.world = config, data, order, world
        self.device = model.select_device(config.train)
        largest = [data.examples[i] for i in order.largest()]
        sharded = world.any_rank(memory.needs_sharding(config, world.size))
        shards = world.size if sharded else 1
        self.student = student = model.load_new_student(config, self.device, sharded=sharded)
        self.checkpointing = world.any_rank(memory.needs_checkpointing(config, largest, shards=shards))
        if self.checkpointing:
            memory.enable_checkpointing(student)
        lora_forward.replace_lora_forward(student, sharded=sharded)
        kept = fsdp.shard_base(student, self.device) if sharded else 0
        if config.train.compile:
            compile.compile_student(student)
        self.named = model.trainable_parameters(student)
        self.optimiser = optim.adamw(self.named.items(), config.train, config.lora)
        self.stepper = Stepper(student, self.named, self.optimiser, config.train, world, sharded=sharded)
        self.looks_always = self.device.type == "cpu"  # elsewhere reading a value makes the host wait
        self.count = flops.flop_counter(student)
        self.checkpoints = config.out_path / "checkpoints"
        self.notes = [
            f"{self.device.type}, base {model.base_dtype(self.device)}, adapter torch.float32".replace(
                "torch.", ""
            )
        ]
        if sharded:
            self.notes.append(f"base sharded: {kept / 2**20:,.1f} MiB of it in each of {shards} processes")
        if self.checkpointing:
            self.notes.append("activations are computed again in the backward pass: they would not fit")
        self.loss: float | None = None
        self._spent_s = 0.0

    def step(self, step: int, asked: Sequence[int]) -> bool:
        """One optimiser update or one skipped step; whether to stop after it."""
        began = time.monotonic()
        train = self.config.train
        packs = [[self.data.examples[i] for i in numbers] for numbers in self.order.packs(step)]
        lr = optim.set_lr(self.optimiser, optim.lr_factor(step, self.order.steps, train))
        learned = self.stepper.learn(step, packs, asked=bool(asked))
        logs = (step + 1) % train.log_every == 0 or step + 1 == self.order.steps
        if step == 0:
            check_first_gradient(float(learned.norm))
        if self.logbook is not None:
            self.logbook.count(learned.tokens, learned.supervised, sum(map(self.count, packs)))
        looks = logs or self.looks_always
        if looks:
            self._look(step, learned, lr, padding_share(packs), logs=logs)
        self._spent_s += time.monotonic() - began
        if self.world.size == 1:
            return bool(asked)
        return looks and bool(learned.asked)  # all ranks look at the same steps, so they stop at the same one

    def _look(self, step: int, learned: StepResult, lr: float, padding: float, *, logs: bool) -> None:
        loss, norm = float(learned.loss), float(learned.norm)
        if math.isfinite(loss) and math.isfinite(norm):
            self.loss = loss
        if logs and self.logbook is not None:
            self.logbook.line(
                {
                    "step": step + 1,
                    "steps": self.order.steps,
                    "epoch": self.order.epoch_of(step),
                    "loss": math.nan if self.loss is None else self.loss,
                    "accuracy": float(learned.accuracy),
                    "grad_norm": norm,
                    "lr": lr,
                    "skipped": self.stepper.skipped,
                    "padding": padding,
                    "memory_bytes": memory_bytes(self.device),
                }
            )
        self.stepper.check(step, str(self.checkpoints))

    def resume(self, *, allow_change: bool) -> int:
        """Steps already done, after putting their state back."""
        found, skipped = checkpoint.newest_valid(self.checkpoints)
        self.notes += [f"checkpoint skipped: {line}" for line in skipped]
        if found is None:
            return 0
        changed = checkpoint.describe_changes(found.state.get("settings", {}), self._settings)
        if changed and not allow_change:
            raise ResumeRefused(
                f"the training in this folder had other settings: {'; '.join(changed)}",
                place=str(self.checkpoints),
                remedy="set them back, choose another [out] path, or say --allow-change",
            )
        self.notes += [f"changed on the way: {line}" for line in changed]
        checkpoint.restore(found, self.optimiser, self.named)
        self.stepper.skipped = int(found.state.get("skipped", 0))
        self.loss = found.state.get("loss")
        self.notes.append(f"resumed at step {found.step} of {self.order.steps}")
        return min(found.step, self.order.steps)

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps. Without room the older one stays, the training goes on."""
        if not self.world.is_leader:
            return
        state = {"settings": self._settings, "skipped": self.stepper.skipped, "loss": self.loss}
        moments = checkpoint.optimiser_moments(self.optimiser, self.named)
        try:
            checkpoint.save(self.checkpoints, checkpoint.Checkpoint(step, state, self.named, moments))
        except (StoreFull, CheckpointError) as error:
            self.notes.append(f"warning: {error.message}; the last good checkpoint is kept")

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """Everything the weights depend on, flat, so that a difference can be named; hashes the base once."""
        told = self.config.model_dump(mode="json")
        flat = {f"{part}.{key}": told[part][key] for part in ("data", "lora", "train") for key in told[part]}
        for key in ("train.log_every", "train.save_every", "train.checkpointing", "train.shard"):
            del flat[key]
        del flat["data.corpus"]
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        return {
            **flat,
            "train.threads": threads,
            "corpus": self.data.sha256,
            "corpus.examples": len(self.data.examples),
            "corpus.tokens": sum(self.data.lengths),
            "base": weights.base_sha256(self.config.base),
            "template": self.template,
        }

    def summary(self, adapter: Path, steps_now: int, wall_s: float) -> Trained:
        """The closing values."""
        tokens = self.logbook.tokens if self.logbook else 0
        if self.logbook and self.logbook.trouble:
            self.notes.append(f"warning: {self.logbook.trouble}")
        return Trained(
            adapter=str(adapter),
            steps=self.order.steps,
            steps_now=steps_now,
            examples=len(self.data.examples),
            excluded=dict(self.data.excluded),
            tokens=tokens,
            loss=self.loss,
            tokens_per_s=tokens / self._spent_s if self._spent_s else 0.0,
            wall_s=wall_s,
            notes=tuple(self.notes),
        )


def memory_bytes(device: torch.device) -> int:
    """Most memory used so far: allocated on CUDA, resident on CPU (Linux counts KiB)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

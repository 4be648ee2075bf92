"""The loop, one page: packs in order, one loss a step, checkpoints, an adapter at the end.

A step's loss is the sum over the supervised tokens of all its packs, divided once by their number, so how a
step is cut into packs changes nothing but memory.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, dataset, export, folding, model, optim
from trainer.collator import Batch, collate
from trainer.config import TrainConfig
from trainer.errors import Interrupted, ResumeRefused, TrainingDiverged
from trainer.hold import held, signals
from trainer.losses import cross_entropy_sum
from trainer.render import Renderer

MAX_BAD_STEPS = 3


@dataclass(frozen=True, slots=True)
class StepLog:
    """What a step did. Rates are since the last log line; loss is nats per supervised token."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    supervised_per_s: float
    skipped: int


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


def train(config: TrainConfig, on_step: Callable[[StepLog], None] = lambda _: None) -> Trained:
    """Train the adapter, or go on where the last run stopped.

    Raises:
        DataError, StudentError, ConfigError: nothing was started.
        ResumeRefused: a half-done training of another configuration or corpus lies in the output folder.
        Interrupted: SIGTERM or SIGINT; the step was finished and checkpointed.
        TrainingDiverged: several steps in a row had no finite loss or gradient.
    """
    with held(config.out_path), signals() as asked:
        began = time.monotonic()
        model.set_threads(config.train)
        device = model.device_of(config.train)
        rows = dataset.read(config)
        renderer = Renderer(model.load_tokenizer(config.base))
        data = dataset.render(rows, renderer, config)
        order = dataset.Order(data.lengths, config.train)
        student = model.with_adapter(config, device)
        folding.fold(student)
        run = _Run(config, data, order, student, device)
        first = run.resume()
        for step in range(first, order.steps):
            run.step(step, on_step)
            if asked:
                run.save(step + 1)
                raise Interrupted(
                    f"stopped after step {step + 1} of {order.steps}, checkpointed",
                    signal_number=asked[0],
                    remedy="the same command goes on from here",
                )
            if config.train.save_every and (step + 1) % config.train.save_every == 0:
                run.save(step + 1)
        if first < order.steps:
            run.save(order.steps)
        adapter = config.out_path / "adapter"
        if first < order.steps or not (adapter / "adapter_config.json").exists():
            export.write_adapter(student, renderer, config, rows)
        return run.summary(adapter, order.steps - first, time.monotonic() - began)


class _Run:
    """The moving parts of one training: student, optimiser, counters."""

    def __init__(
        self,
        config: TrainConfig,
        data: dataset.Dataset,
        order: dataset.Order,
        student: Any,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.order, self.student, self.device = config, data, order, student, device
        self.named = model.trainable(student)
        self.optimiser = optim.adamw(self.named.items(), config.train, config.lora)
        self.checkpoints = config.out_path / "checkpoints"
        self.log = config.out_path / "train.jsonl"
        self.notes: list[str] = []
        self.tokens = self.skipped = self.bad_in_row = 0
        self.loss: float | None = None
        self._clock = time.monotonic()
        self._since = [0, 0]  # tokens and supervised tokens since the last log line
        self._spent_s = 0.0

    def step(self, step: int, on_step: Callable[[StepLog], None]) -> None:
        """One optimiser update, or one skipped step."""
        began = time.monotonic()
        train = self.config.train
        torch.manual_seed(train.seed * 1_000_003 + step)  # dropout is a function of (seed, step)
        packs = [[self.data.examples[i] for i in numbers] for numbers in self.order.packs(step)]
        batches = [collate(examples, self.device) for examples in packs]
        supervised = sum(batch.supervised for batch in batches)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in batches:
            part, right = cross_entropy_sum(forward(self.student, batch), batch.targets)
            (part / supervised).backward()  # type: ignore[no-untyped-call]
            loss += part.detach()
            correct += right
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), train.clip)
        lr = optim.set_lr(self.optimiser, optim.lr_factor(step, self.order.steps, train))
        self._update(step, float(loss) / supervised, float(norm))
        self.optimiser.zero_grad(set_to_none=True)
        self._count(sum(batch.tokens for batch in batches), supervised, time.monotonic() - began)
        if (step + 1) % train.log_every == 0 or step + 1 == self.order.steps:
            self._report(step, int(correct) / supervised, float(norm), lr, on_step)

    def _update(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimiser.step()
            self.loss, self.bad_in_row = loss, 0
            return
        self.skipped += 1
        self.bad_in_row += 1
        if self.bad_in_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"loss or gradient was not finite {MAX_BAD_STEPS} steps in a row, the last at {step + 1}",
                place=str(self.checkpoints),
                remedy="lower [train] lr; the last checkpoint is good",
            )

    def _count(self, tokens: int, supervised: int, seconds: float) -> None:
        self.tokens += tokens
        self._since[0] += tokens
        self._since[1] += supervised
        self._spent_s += seconds

    def _report(
        self, step: int, accuracy: float, norm: float, lr: float, on_step: Callable[[StepLog], None]
    ) -> None:
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9)
        loss = self.loss if self.loss is not None else math.nan
        line = StepLog(
            step=step + 1,
            steps=self.order.steps,
            epoch=self.order.epoch_of(step),
            loss=loss,
            accuracy=accuracy,
            grad_norm=norm,
            lr=lr,
            tokens_per_s=self._since[0] / seconds,
            supervised_per_s=self._since[1] / seconds,
            skipped=self.skipped,
        )
        self._clock, self._since = now, [0, 0]
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
        on_step(line)

    def resume(self) -> int:
        """Steps already done, after putting their state back."""
        found, skipped = checkpoint.newest(self.checkpoints)
        self.notes += [f"checkpoint skipped: {line}" for line in skipped]
        self._clock = time.monotonic()
        if found is None:
            return 0
        changed = changes(found.state.get("settings", {}), self._settings())
        if changed:
            raise ResumeRefused(
                f"the training in this folder had other settings: {'; '.join(changed)}",
                place=str(self.checkpoints),
                remedy="set them back, choose another [out] path, or remove the checkpoints",
            )
        checkpoint.restore(found, self.optimiser, self.named)
        self.skipped = int(found.state.get("skipped", 0))
        self.loss = found.state.get("loss")
        self.notes.append(f"resumed at step {found.step} of {self.order.steps}")
        return found.step

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps."""
        state = {"settings": self._settings(), "skipped": self.skipped, "loss": self.loss}
        moments = checkpoint.moments_of(self.optimiser, self.named)
        checkpoint.save(self.checkpoints, checkpoint.Checkpoint(step, state, self.named, moments))

    def _settings(self) -> dict[str, Any]:
        """Everything the weights depend on, flat, so that a difference can be named."""
        told = self.config.model_dump(mode="json")
        flat = {f"{part}.{key}": told[part][key] for part in ("data", "lora", "train") for key in told[part]}
        for key in ("train.log_every", "train.save_every", "data.corpus"):
            del flat[key]
        threads = torch.get_num_threads() if self.device.type == "cpu" else 0
        return {
            **flat,
            "train.threads": threads,
            "corpus": self.data.sha256,
            "base": model.base_sha256(self.config.base),
        }

    def summary(self, adapter: Path, steps_now: int, wall_s: float) -> Trained:
        """The closing values."""
        return Trained(
            adapter=str(adapter),
            steps=self.order.steps,
            steps_now=steps_now,
            examples=len(self.data.examples),
            excluded=dict(self.data.excluded),
            tokens=self.tokens,
            loss=self.loss,
            tokens_per_s=self.tokens / self._spent_s if self._spent_s else 0.0,
            wall_s=wall_s,
            notes=tuple(self.notes),
        )


def forward(student: Any, batch: Batch) -> torch.Tensor:
    """Logits [supervised, vocabulary] of a packed row: the head runs on judged positions only."""
    out = student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predict_at,
        segments=batch.segments,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One phrase for each setting that differs."""
    keys = sorted({*before, *now})
    return [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]

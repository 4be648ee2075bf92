"""Report the steps and evaluations of a training: log lines, and the callbacks for progress displays."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from trainer.config import TrainConfig
from trainer.data.chat_template import Example
from trainer.data.collator import padding_share
from trainer.data.order import Order
from trainer.model import model
from trainer.training import flops
from trainer.training.distributed import World
from trainer.training.logbook import Evaluation, Logbook, Sampled, StepLog
from trainer.training.step import StepResult
from trainer.training.student import TrainableStudent
from trainer.training.trackers import Trackers


@dataclass(frozen=True, slots=True)
class Callbacks:
    """Callbacks for a caller that shows progress.

    Attributes:
        on_start: called before the first step, with the steps done, the steps in all, and notes.
        on_step: called with each line of the log.
        on_evaluation: called after each evaluation that `[evaluate] every` asks for.
        on_samples: called with the answers that `[evaluate] sample_every` asks for. This one, `on_evaluation`
            and `on_step` are called on the leading process only.
        on_rows: called while a large corpus is tokenised, with the rows done, all rows, and what is done.
    """

    on_start: Callable[[int, int, Sequence[str]], None] = lambda _done, _steps, _notes: None
    on_step: Callable[[StepLog], None] = lambda _: None
    on_evaluation: Callable[[Evaluation], None] = lambda _: None
    on_samples: Callable[[Sampled], None] = lambda _: None
    on_rows: Callable[[int, int, str], None] = lambda _done, _rows, _doing: None


NO_CALLBACKS = Callbacks()


class Reporter:
    """Writes the log of one training on the leading process, and does nothing on the others.

    Args:
        first: steps done already; lines of later steps are removed, since these steps are made again.
    """

    def __init__(
        self,
        config: TrainConfig,
        order: Order,
        student: TrainableStudent,
        world: World,
        callbacks: Callbacks,
        *,
        first: int,
    ) -> None:
        self._config = config.train
        self._order = order
        self._device = student.device
        self._callbacks = callbacks
        self._flop_of_pack = flops.flop_counter(student.model)
        self._logbook: Logbook | None = None
        if world.is_leader:
            peak = fleet_peak_flops(student.device, world)
            self._logbook = Logbook(config.out_path, callbacks.on_step, peak, Trackers(config))
            self._logbook.drop_lines_after(first)

    @property
    def tokens(self) -> int:
        """Tokens counted so far; 0 on processes that do not lead."""
        return self._logbook.tokens if self._logbook else 0

    @property
    def problem(self) -> str:
        """Why the last line was not written, empty if it was."""
        return self._logbook.problem if self._logbook else ""

    def close(self) -> None:
        """End the runs of the experiment trackers."""
        if self._logbook is not None:
            self._logbook.close()

    def is_line_due(self, step: int) -> bool:
        """Whether `log_every` or `log_every_s` asks for a line of this step (0-based)."""
        if (step + 1) % self._config.log_every == 0 or step + 1 == self._order.steps:
            return True
        return self._logbook is not None and 0 < self._config.log_every_s <= self._logbook.seconds_since_line

    def count(self, result: StepResult, packs: Sequence[Sequence[Example]]) -> None:
        """Count the tokens and the arithmetic of a step; the next line reports rates from them."""
        if self._logbook is not None:
            flop = sum(map(self._flop_of_pack, packs)) if self._flop_of_pack else 0.0
            self._logbook.add_step(result.tokens, result.supervised, flop)

    def write_step(
        self,
        step: int,
        result: StepResult,
        packs: Sequence[Sequence[Example]],
        *,
        loss: float | None,
        lr: float,
        skipped: int,
    ) -> None:
        """Write the line of a step (0-based).

        Args:
            loss: last finite loss in nats per supervised token.
            skipped: steps so far whose numbers were not finite.
        """
        if self._logbook is None:
            return
        self._logbook.write_line(
            {
                "step": step + 1,
                "steps": self._order.steps,
                "epoch": self._order.epoch_of(step),
                "loss": math.nan if loss is None else loss,
                "accuracy": float(result.accuracy),
                "grad_norm": float(result.norm),
                "lr": lr,
                "skipped": skipped,
                "padding": padding_share(packs),
                "memory_bytes": peak_memory_bytes(self._device),
            }
        )

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write the line of an evaluation."""
        if self._logbook is not None:
            self._logbook.write_evaluation(evaluation)
            self._callbacks.on_evaluation(evaluation)

    def write_samples(self, sampled: Sampled) -> None:
        """Write the line of sampled answers."""
        if self._logbook is not None:
            self._logbook.write_samples(sampled)
            self._callbacks.on_samples(sampled)


def fleet_peak_flops(device: torch.device, world: World) -> float | None:
    """Return the peak arithmetic of all ranks' devices together in FLOP/s, None if unknown."""
    peak = model.peak_flops(device)
    return None if peak is None else peak * world.size


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak so far: allocated on CUDA, resident set on the CPU (getrusage counts KiB on Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

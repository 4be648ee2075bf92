"""Write the training log: one JSON line every few steps; and pass its figures to experiment trackers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.training.trackers import Trackers


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """The first step is about to be made.

    Attributes:
        steps_done: by earlier calls; steps: of the whole training.
        notes: lines for the operator: device, resumed step, warnings.
    """

    steps_done: int
    steps: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepLog:
    """One line of train.jsonl: a step and the rates since the line before.

    Attributes:
        step: steps done, from 1; steps: of the whole training; epoch: from 0.
        loss: nats per supervised token; accuracy: share of supervised tokens predicted correctly.
        grad_norm: L2 norm before clipping; lr: learning rate of the first parameter group.
        skipped: steps so far whose numbers were not finite.
        padding: share of the cells of attention's grid that hold no token (linear layers run on no padding).
        flop_per_s: arithmetic as `flops` counts it, 0 if unknown.
        mfu: share of the device's peak arithmetic, None if unknown.
        memory_bytes: peak allocation on CUDA, peak resident set of the process on the CPU.
    """

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
    padding: float
    flop_per_s: float
    mfu: float | None
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation during the training found; a line of train.jsonl.

    Attributes:
        step: steps done; steps: of the whole training.
        held_out_loss: nats per supervised token of the held-out answers.
        best_step: step with the lowest held-out loss so far; best_loss: that loss.
        answers: prompt_id, prompt, answer, reference and teacher's answer of a few held-out prompts.
        seconds: time that the evaluation took.
    """

    step: int
    steps: int
    held_out_loss: float
    best_step: int
    best_loss: float
    answers: tuple[dict[str, str | None], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the student answers to a few held-out prompts during the training; a line of train.jsonl.

    Attributes:
        step: steps done; steps: of the whole training.
        answers: as of `Evaluation`.
        seconds: time that the answers took.
    """

    step: int
    steps: int
    answers: tuple[dict[str, str | None], ...]
    seconds: float


class Logbook:
    """Counts work between log lines and writes the lines.

    Args:
        folder: receives train.jsonl.
        trackers: receive its figures, too; None: there are none.
        on_line: called with each line.
        peak: peak arithmetic of the device in FLOP/s, None if unknown.

    Attributes:
        tokens: tokens counted so far.
        problem: why the last write failed, empty if none did.
    """

    def __init__(
        self,
        folder: Path,
        on_line: Callable[[StepLog], None],
        peak: float | None,
        trackers: Trackers | None = None,
    ) -> None:
        self._path, self._on_line, self._peak = folder / "train.jsonl", on_line, peak
        self._trackers = trackers
        self.tokens = 0
        self.problem = ""
        self._last_line_at = time.monotonic()
        self._since_last_line = [0.0, 0.0, 0.0]

    @property
    def seconds_since_line(self) -> float:
        """Seconds since the last line, or since the start."""
        return time.monotonic() - self._last_line_at

    def drop_lines_after(self, step: int) -> None:
        """Remove the lines of steps after `step` (1-based): these steps are made again after a resume."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                aside = self._path.with_name(f".{self._path.name}.tmp")
                aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                aside.rename(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(error)

    def add_step(self, tokens: int, supervised: int, flop: float) -> None:
        """Count one step's tokens, supervised tokens and FLOP; the next line reports rates from them."""
        self.tokens += tokens
        for index, value in enumerate((tokens, supervised, flop)):
            self._since_last_line[index] += value

    def write_line(self, facts: dict[str, Any]) -> StepLog:
        """Write one line and pass it to `on_line`.

        A write that fails sets `problem` and does not end the training.

        Args:
            facts: the fields of StepLog that are not rates.
        """
        now = time.monotonic()
        tokens, supervised, flop = (
            value / max(now - self._last_line_at, 1e-9) for value in self._since_last_line
        )
        self._last_line_at, self._since_last_line = now, [0.0, 0.0, 0.0]
        mfu = flop / self._peak if self._peak and flop else None
        log = StepLog(**facts, tokens_per_s=tokens, supervised_per_s=supervised, flop_per_s=flop, mfu=mfu)
        values = asdict(log)
        self._append(values)
        self._track(values)
        self._on_line(log)
        return log

    def write_evaluation(self, evaluation: Evaluation) -> None:
        """Write the line of an evaluation; the time it took does not count in the rates of the next step."""
        self._last_line_at += evaluation.seconds
        values = {name: _finite(value) for name, value in asdict(evaluation).items()}
        self._append(values)
        self._track({"step": evaluation.step, "held_out_loss": values["held_out_loss"]})

    def write_samples(self, sampled: Sampled) -> None:
        """Write the line of sampled answers; their time does not count in the rates of the next step."""
        self._last_line_at += sampled.seconds
        self._append(asdict(sampled))

    def _append(self, values: dict[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        self.problem = f"{self._path.name} not written: {error.strerror}"

    def _track(self, values: dict[str, Any]) -> None:
        if self._trackers is None:
            return
        self._trackers.write(values)
        self.problem = self._trackers.problem or self.problem

    def close(self) -> None:
        """End the runs of the trackers."""
        if self._trackers is not None:
            self._trackers.close()


def _finite(value: Any) -> Any:
    """Return None for a number that JSON can't write."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut off by a kill

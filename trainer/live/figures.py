"""Keep what the events of a training say, and write its figures as texts: loss, speed, time left."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.training.logbook import Evaluation, Sampled, StepLog, TrainingStarted

TrainingEvent = TrainingStarted | StepLog | Evaluation | Sampled

# Lines of the log whose pace decides the time left.
PACE_LINES = 20

# Points that a curve keeps; when it has more, every second one goes.
MOST_POINTS = 2000

UNKNOWN_MFU = "unknown: the peak of this device is in no table"

_GIB, _MIB = 1 << 30, 1 << 20


class Curve:
    """Keep values by step, at most `MOST_POINTS` of them at equal distances."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._stride, self._seen = 1, 0

    def add(self, step: float, value: float) -> None:
        """Add a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        if self._seen % self._stride == 0:
            self.points.append((step, value))
        self._seen += 1
        if len(self.points) > MOST_POINTS:
            self.points = self.points[::2]
            self._stride *= 2


class Figures:
    """Hold how far a training is, as its events say.

    Args:
        clock: seconds that never go back.

    Attributes:
        steps_done, steps: of the whole training.
        notes: lines for the operator: device, resumed step, warnings.
        line: newest line of the log, None before the first.
        evaluation: newest evaluation, None before the first.
        answers: newest sampled answers; answers_step: steps done then, 0 before the first.
        loss, held_out, speed: the curves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.steps_done = self.steps = 0
        self.notes: tuple[str, ...] = ()
        self.line: StepLog | None = None
        self.evaluation: Evaluation | None = None
        self.answers: tuple[Mapping[str, str | None], ...] = ()
        self.answers_step = 0
        self.loss, self.held_out, self.speed = Curve(), Curve(), Curve()
        self._started = clock()
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_LINES)

    def add(self, event: TrainingEvent) -> None:
        """Take in an event."""
        match event:
            case TrainingStarted():
                self.steps_done, self.steps, self.notes = event.steps_done, event.steps, event.notes
                self._started = self._clock()
                self._pace.append((event.steps_done, self._started))
            case StepLog():
                self.line, self.steps_done, self.steps = event, event.step, event.steps
                self._pace.append((event.step, self._clock()))
                self.loss.add(event.step, event.loss)
                self.speed.add(event.step, event.tokens_per_s)
            case Evaluation():
                self.evaluation = event
                self.held_out.add(event.step, event.held_out_loss)
                self._take_answers(event.step, event.answers)
            case Sampled():
                self._take_answers(event.step, event.answers)

    def _take_answers(self, step: int, answers: tuple[Mapping[str, str | None], ...]) -> None:
        if answers:
            self.answers, self.answers_step = answers, step

    def read_log(self, path: Path) -> None:
        """Take curves and answers of earlier calls from a train.jsonl; damaged lines are left out."""
        for entry in _entries(path):
            try:
                step = int(entry["step"])
                if "held_out_loss" in entry:
                    self.held_out.add(step, _number(entry["held_out_loss"]))
                if "answers" in entry:
                    self._take_answers(step, tuple(dict(answer) for answer in entry["answers"]))
                else:
                    self.loss.add(step, _number(entry["loss"]))
                    self.speed.add(step, _number(entry["tokens_per_s"]))
            except (LookupError, TypeError, ValueError):
                continue

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first step of this call."""
        return self._clock() - self._started

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step at the pace of the last lines, with evaluations; None if unknown."""
        if len(self._pace) < 2:
            return None
        (first_step, first_at), (last_step, last_at) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return None
        step_s = (last_at - first_at) / (last_step - first_step)
        return max(0.0, (self.steps - last_step) * step_s - (self._clock() - last_at))

    @property
    def left(self) -> str:
        """The time left, as "12 min"; "unknown" before two lines of the log."""
        return "unknown" if self.left_s is None else span(self.left_s)

    @property
    def mfu(self) -> str:
        """The share of the device's peak arithmetic, or why there is none."""
        if self.line is None:
            return "unknown"
        return UNKNOWN_MFU if self.line.mfu is None else f"{self.line.mfu:.1%}"

    @property
    def memory(self) -> str:
        """The most memory so far: allocated on CUDA, resident on the CPU."""
        return "unknown" if self.line is None else memory_text(self.line.memory_bytes)

    @property
    def held_out_text(self) -> str:
        """The newest held-out loss and whether it is the lowest; empty without evaluations."""
        if self.evaluation is None:
            return ""
        return held_out_words(self.evaluation, f" at step {self.evaluation.step:,}")

    @property
    def detail(self) -> str:
        """One line about the newest step."""
        if self.line is None:
            return "first step"
        mfu = "" if self.line.mfu is None else f", MFU {self.line.mfu:.1%}"
        left = "" if self.left_s is None or self.steps_done >= self.steps else f", {self.left} left"
        return (
            f"epoch {self.line.epoch + 1}, loss {self.line.loss:.3f}, "
            f"{self.line.tokens_per_s:,.0f} tokens/s{mfu}, {self.memory}{left}"
        )


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a train.jsonl that are JSON objects."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict):
                    yield entry
    except OSError:
        return


def held_out_words(evaluation: Evaluation, at: str = "") -> str:
    """Return the held-out loss of an evaluation, and whether it is the lowest so far."""
    best = ", the lowest so far" if evaluation.best_step == evaluation.step else ""
    return f"held-out loss {evaluation.held_out_loss:.4f}{at}{best}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def span(seconds: float) -> str:
    """Return a duration as "45 s", "12 min", "3 h 20 min" or "2 d 4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def memory_text(size: int) -> str:
    """Return bytes as "812 MiB" or "12.3 GiB"."""
    return f"{size / _GIB:,.1f} GiB" if size >= 4 * _GIB else f"{size / _MIB:,.0f} MiB"

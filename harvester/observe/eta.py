"""Estimate the time, tokens and cost that are left of a run, and its rates over the last minute.

Rows differ in length, so the time left is computed from the tokens left, not from rows. The range spans the
fastest and the slowest of three speeds: the last minute, the last ten minutes, the whole run; paused time is
not counted. It is widened by two standard errors of tokens per answer, estimated by batch means. It is never
less than the limits in force allow: one that was lowered a moment ago is in no speed yet.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from statistics import stdev

MINUTE_S = 60.0
SPANS_S = (60.0, 600.0, math.inf)
# Least seconds between two stored points: 300 points cover ten minutes.
EVERY_S = 2.0
# Bounds of the relative error; UNKNOWN_ERROR also applies below FEWEST_BATCHES batches.
LEAST_ERROR = 0.02
UNKNOWN_ERROR = 0.5
FEWEST_BATCHES = 5


@dataclass(frozen=True, slots=True)
class Point:
    """Counters of a run at one instant; `active_s` is the time that was not spent on hold."""

    at: float
    active_s: float
    sent: int = 0
    refused: int = 0
    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """The rows that have no ending yet, and their input tokens as estimated before sending.

    `guessed_input` is the mean estimate of the rows that were taken so far; against what the teacher reported
    it calibrates the estimates of those to come.
    """

    rows: int
    input_tokens: float
    guessed_input: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits in force, in units per minute; infinity where none is known."""

    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf


UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class Span:
    """A range and its most likely value."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is left: tokens, seconds of work, and the whole run's cost in micro-dollars."""

    tokens: Span
    seconds: Span
    cost_microusd: Span


class Forecast:
    """Keeps the points of the last ten minutes, and the first point of the run."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=int(SPANS_S[1] / EVERY_S) + 2)
        self._first: Point | None = None

    def note(self, point: Point) -> None:
        """Add a point; it replaces the last one if that is less than `EVERY_S` after its predecessor."""
        if self._first is None:
            self._first = point
        if len(self._points) > 1 and point.at - self._points[-2].at < EVERY_S:
            self._points[-1] = point
        else:
            self._points.append(point)

    def per_minute(self, name: str) -> float:
        """Return units per minute of one counter over the last minute, paused time included."""
        if not self._points:
            return 0.0
        last = self._points[-1]
        since = next(point for point in self._points if point.at >= last.at - MINUTE_S)
        span = last.at - since.at
        done: float = getattr(last, name) - getattr(since, name)
        return done * MINUTE_S / span if span > 0 else 0.0

    def refused_share(self) -> float:
        """Return share of the requests of the last minute that the teacher refused for the rate (429)."""
        sent = self.per_minute("sent")
        return min(1.0, self.per_minute("refused") / sent) if sent else 0.0

    def ahead(self, work: Work, limits: Limits = UNLIMITED) -> Ahead | None:
        """Return what is left; None before the first answer."""
        if self._first is None or not self._points:
            return None
        last = self._points[-1]
        speeds = [speed for span in SPANS_S if (speed := self._speed(span)) > 0]
        if not last.answers or not speeds:
            return None
        tokens_each = last.input_tokens / last.answers
        factor = min(4.0, max(0.25, tokens_each / work.guessed_input)) if work.guessed_input else 1.0
        tokens = work.input_tokens * factor + work.rows * last.output_tokens / last.answers
        error = self._error("tokens")
        spread = Span(tokens * (1 - error), tokens, tokens * (1 + error))
        requests = work.rows * min(1.0, last.sent / last.answers)  # fewer where one asks for several answers
        least_s = requests * MINUTE_S / limits.requests_per_minute
        guesses = zip(
            (spread.low, tokens, spread.high),
            (max(speeds), speeds[len(speeds) // 2], min(speeds)),
            strict=True,
        )
        seconds = Span(
            *(max(n / speed, n * MINUTE_S / limits.tokens_per_minute, least_s) for n, speed in guesses)
        )
        each = last.cost_microusd / last.answers
        error = self._error("cost_microusd")
        cost = Span(*(last.cost_microusd + work.rows * each * (1 + e) for e in (-error, 0.0, error)))
        return Ahead(spread, seconds, cost)

    def _speed(self, span_s: float) -> float:
        """Tokens per second over the last `span_s` seconds that were not paused."""
        last = self._points[-1]
        assert self._first is not None
        since = self._first
        if not math.isinf(span_s):
            since = next(point for point in self._points if point.active_s >= last.active_s - span_s)
        span = last.active_s - since.active_s
        return (last.tokens - since.tokens) / span if span > 0 else 0.0

    def _error(self, name: str) -> float:
        """Two standard errors of units per answer, relative to the mean (batch means)."""
        means = [
            (getattr(b, name) - getattr(a, name)) / (b.answers - a.answers)
            for a, b in pairwise(self._points)
            if b.answers > a.answers
        ]
        if len(means) < FEWEST_BATCHES:
            return UNKNOWN_ERROR
        mean = sum(means) / len(means)
        if mean <= 0:
            return 0.0
        error: float = 2 * stdev(means) / math.sqrt(len(means)) / mean
        return min(UNKNOWN_ERROR, max(LEAST_ERROR, error))

"""Find out whether more requests in flight bring more answers, by the latency at each number. Pure.

By Little's law (L = lambda * W), n requests in flight that each take t seconds bring n / t answers per
second. A server that queues takes longer the more are in flight: beyond the number that it works on at once,
n / t no longer grows. Latency alone says nothing, for long answers take long. Answers differ in length, so
the same is computed with tokens per second, and whichever of the two scatters less is believed.

The elasticity is the relative growth of answers per second over that of the requests in flight: 1 when twice
as many bring twice as much, 0 when they bring nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

# Up to this number in flight each has its own statistics, beyond it each range of a factor STEP.
EXACT = 16
STEP = 1.25
# A new sample weighs at least 1 / MEMORY.
MEMORY = 40
# Samples of an earlier process weigh as much as this many new ones, at most.
RESUMED = 10.0
# No more in flight are tried when the elasticity is below this, by more than STANDARD_ERRORS standard errors.
LEAST_ELASTICITY = 0.2
STANDARD_ERRORS = 1.5
# A level counts by itself after this many samples.
LEAST_COUNT = 5
# Relative scatter of latencies is taken to be at least this.
LEAST_SCATTER = 0.05
# Shorter latencies are never looked at: no harm is done by a queue as short as this.
SHORT_S = 0.5


@dataclass(slots=True)
class _Mean:
    """Mean and variance of logarithms, the older samples weighing less (Welford, with a bounded count)."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float) -> None:
        self.count = min(MEMORY, self.count + 1)
        step = value - self.mean
        self.mean += step / self.count
        self.variance += (step * (value - self.mean) - self.variance) / self.count


@dataclass(slots=True)
class _Level:
    """Samples at one number in flight; logarithms of the number, of 1 / latency, and of tokens / latency."""

    number: _Mean = field(default_factory=_Mean)
    answers: _Mean = field(default_factory=_Mean)
    tokens: _Mean = field(default_factory=_Mean)


@dataclass(frozen=True, slots=True)
class _Pool:
    """Several levels together."""

    number: float
    count: float
    mean: float

    def throughput(self) -> float:
        """Logarithm of what this many in flight bring per second."""
        return self.number + self.mean


class Throughput:
    """Latencies of one endpoint by the number in flight at admission."""

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def add(self, in_flight: int, latency_s: float, tokens: int) -> None:
        """Record an answer to a request that was admitted as number `in_flight`."""
        level = self._levels.setdefault(_index(in_flight), _Level())
        latency = math.log(max(latency_s, 1e-4))
        level.number.add(math.log(in_flight))
        level.answers.add(-latency)
        level.tokens.add(math.log(max(1, tokens)) - latency)

    def forget(self) -> None:
        """Forget everything."""
        self._levels.clear()

    def saved(self) -> list[list[float]]:
        """Return the levels as numbers, for `resume` in a later process."""
        return [
            [mean.count, mean.mean, mean.variance]
            for level in self._levels.values()
            for mean in (level.number, level.answers, level.tokens)
        ]

    def resume(self, saved: list[list[float]]) -> None:
        """Continue from `saved`; what was seen then weighs less than what is seen now."""
        means = [_Mean(min(RESUMED, count), mean, variance) for count, mean, variance in saved]
        for number, answers, tokens in zip(means[::3], means[1::3], means[2::3], strict=True):
            self._levels[_index(round(math.exp(number.mean)))] = _Level(number, answers, tokens)

    def latency_s(self, in_flight: float, deviations: float = 0.0) -> float | None:
        """Return typical latency at about this many in flight (three quarters and more), None if unknown.

        Args:
            deviations: this many standard deviations above the typical one.
        """
        levels = self._between(0.75 * in_flight, math.inf)
        if not levels:
            return None
        pool = _pool(levels, tokens=False)
        squares = sum(
            level.answers.count * (level.answers.variance + (level.answers.mean - pool.mean) ** 2)
            for level in levels
        )
        return math.exp(-pool.mean + deviations * math.sqrt(squares / pool.count))

    def works_on(self, in_flight: float) -> int | None:
        """Return how many the server works on at once, where more in flight bring nothing; else None.

        It is the best throughput seen times the latency without a queue (Little's law again).
        """
        top, tokens = self._top(in_flight), self._believes_tokens()
        if not top:
            return None
        pool = _pool(top, tokens=tokens)
        if pool.count < 2 or math.exp(-_pool(top, tokens=False).mean) < SHORT_S:
            return None
        scatter = max(LEAST_SCATTER, self._scatter(tokens=tokens))
        for below in self._candidates(in_flight):
            lower = _pool(below, tokens=tokens)
            distance = pool.number - lower.number
            error = scatter * math.sqrt(1 / pool.count + 1 / lower.count) / distance
            if (
                pool.throughput() - lower.throughput()
            ) / distance + STANDARD_ERRORS * error < LEAST_ELASTICITY:
                fastest = _pool(self._between(0, math.exp(lower.number) * 1.01), tokens=tokens)
                return max(1, round(math.exp(self._best(pool, tokens=tokens) - fastest.mean)))
        return None

    def _best(self, top: _Pool, *, tokens: bool) -> float:
        """Logarithm of the best throughput: of the top, or of a single level that was seen often enough.

        Answers that end together make the levels just above the number that is worked on look slow.
        """
        levels = [_pool([level], tokens=tokens) for level in self._levels.values()]
        return max([top.throughput(), *(one.throughput() for one in levels if one.count >= LEAST_COUNT)])

    def _candidates(self, in_flight: float) -> Iterable[list[_Level]]:
        """Sets of levels well below `in_flight` to compare the top with."""
        for index in sorted(self._levels):
            level = self._levels[index]
            if 1 <= math.exp(level.number.mean) <= 0.7 * in_flight:
                yield [level]
        for share in (0.5, 0.25):
            if levels := self._between(share * in_flight / 2, share * in_flight):
                yield levels

    def _top(self, in_flight: float) -> list[_Level]:
        return self._between(0.8 * in_flight, 1.2 * in_flight)

    def _between(self, low: float, high: float) -> list[_Level]:
        return [level for level in self._levels.values() if low <= math.exp(level.number.mean) <= high]

    def _believes_tokens(self) -> bool:
        return self._scatter(tokens=True) < self._scatter(tokens=False)

    def _scatter(self, *, tokens: bool) -> float:
        """Standard deviation within the levels."""
        total = weight = 0.0
        for level in self._levels.values():
            mean = level.tokens if tokens else level.answers
            if mean.count >= 2:
                total += mean.count * mean.variance
                weight += mean.count - 1
        return math.sqrt(total / weight) if weight else math.inf


def _index(in_flight: int) -> int:
    if in_flight <= EXACT:
        return in_flight
    return EXACT + 1 + int(math.log(in_flight / EXACT) / math.log(STEP))


def _pool(levels: list[_Level], *, tokens: bool) -> _Pool:
    count = sum(level.number.count for level in levels)
    means = [(level.tokens if tokens else level.answers).mean for level in levels]
    return _Pool(
        sum(level.number.count * level.number.mean for level in levels) / count,
        count,
        sum(level.number.count * mean for level, mean in zip(levels, means, strict=True)) / count,
    )

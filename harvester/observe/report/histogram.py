"""Summarise many values in few numbers that can be added: logarithmic histograms, counts by time.

A cell of a histogram is a 32nd of an octave wide: a quantile read from it is off by 1.1 % at most, and whole
numbers below 47 have a cell each.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

CELLS_PER_OCTAVE = 32
# Values between 0 and this one are counted as this one.
LEAST = 1e-9
MOST_BUCKETS = 600


@dataclass(slots=True)
class Histogram:
    """Counts by cell: cell c holds values from 2^(c/32) to 2^((c+1)/32); those of 0 or less are `zeros`."""

    cells: Counter[int] = field(default_factory=Counter)
    zeros: int = 0

    @property
    def count(self) -> int:
        """Values noted."""
        return self.zeros + self.cells.total()

    @staticmethod
    def cell(value: float) -> int:
        """Return the cell of a value above 0."""
        return math.floor(math.log2(max(value, LEAST)) * CELLS_PER_OCTAVE)

    def note(self, value: float) -> None:
        """Count one value."""
        if value > 0:
            self.cells[self.cell(value)] += 1
        else:
            self.zeros += 1

    def add(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self.cells.update(other.cells)
        self.zeros += other.zeros

    def quantile(self, share: float) -> float:
        """Return the value below which that share lies: the middle of its cell, 0.0 if nothing was noted."""
        rank = share * self.count
        seen = self.zeros
        if rank < seen or not self.cells:
            return 0.0
        for cell in sorted(self.cells):
            seen += self.cells[cell]
            if rank < seen:
                break
        return float(2 ** ((cell + 0.5) / CELLS_PER_OCTAVE))


def edge(cell: int) -> float:
    """Lower edge of a cell."""
    return float(2 ** (cell / CELLS_PER_OCTAVE))


@dataclass(slots=True)
class TimeBuckets:
    """Counts by time in buckets that widen, by doubling, so that there are never more than `MOST_BUCKETS`.

    Attributes:
        step_us: width of a bucket in microseconds; a power of two times 1/4 s.
        buckets: start of the bucket over `step_us` -> count.
    """

    step_us: int = 250_000
    buckets: Counter[int] = field(default_factory=Counter)

    def note(self, counts: Mapping[int, int], step_us: int) -> None:
        """Take counts by bucket of `step_us`, which is a power of two times 1/4 s."""
        while self.step_us < step_us:
            self._widen()
        for bucket, count in counts.items():
            self.buckets[bucket * step_us // self.step_us] += count
        while len(self.buckets) > MOST_BUCKETS:
            self._widen()

    def add(self, other: TimeBuckets) -> None:
        """Take another timeline's counts."""
        self.note(other.buckets, other.step_us)

    def _widen(self) -> None:
        self.step_us *= 2
        wide: Counter[int] = Counter()
        for bucket, count in self.buckets.items():
            wide[bucket // 2] += count
        self.buckets = wide

    def rates(self) -> list[tuple[float, float]]:
        """Return (Unix seconds at the middle of a bucket, units per second), with zeros beside gaps."""
        step_s = self.step_us / 1e6
        points: dict[int, int] = {}
        for bucket, count in self.buckets.items():
            points.setdefault(bucket - 1, 0)
            points.setdefault(bucket + 1, 0)
            points[bucket] = count
        return [((bucket + 0.5) * step_s, points[bucket] / step_s) for bucket in sorted(points)]


def step_for(span_us: int) -> int:
    """Return the narrowest step that cuts a span into no more than `MOST_BUCKETS`."""
    step = TimeBuckets().step_us
    while span_us // step >= MOST_BUCKETS:
        step *= 2
    return step

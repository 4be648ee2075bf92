"""Fit a saturating power law to scores by number of rows: score = a - b * rows^-c. Needs numpy only.

`a` is the score that is approached with ever more rows. An accuracy rises to it (b > 0), a loss falls to it
(b < 0); b is bounded on neither side, so that scores which do not improve give an interval around zero.

For a fixed c the best a and b follow from linear least squares, so only c is searched: on a grid, then by
golden section around its best point (variable projection, Golub and Pereyra 1973). All curves of a bootstrap
are fitted at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Bounds of c. At the lower one the curve is nearly a line over log(rows), at the upper one a step.
C_LOW, C_HIGH = 0.02, 5.0
GRID_POINTS = 40
# The interval of the golden section shrinks to 0.618^45 = 4e-10 of its size; for resamples, whose scores are
# noisy, to 0.618^12 = 3e-3.
GOLDEN_STEPS, GOLDEN_STEPS_OF_RESAMPLES = 45, 12
_GOLDEN = (5**0.5 - 1) / 2
# Three parameters are fitted: fewer sizes than this leave no residual to judge the fit by.
FEWEST_SIZES = 4


@dataclass(frozen=True, slots=True)
class PowerLaws:
    """Curves score = a - b * rows^-c, one for each entry of the arrays.

    Attributes:
        limit: a, the score that is approached.
        at_largest: the score at the largest size that was fitted.
        exponent: c.
        largest: that size in rows.
    """

    limit: Floats
    at_largest: Floats
    exponent: Floats
    largest: float

    @property
    def factor(self) -> Floats:
        """Return b."""
        return (self.limit - self.at_largest) * self.largest**self.exponent

    def at(self, rows: float) -> Floats:
        """Return the score of each curve at a number of rows."""
        shrunk = (rows / self.largest) ** -self.exponent
        return self.limit - (self.limit - self.at_largest) * shrunk


def fit(
    sizes: Sequence[float], scores: npt.ArrayLike, limits: tuple[float, float], *, steps: int = GOLDEN_STEPS
) -> PowerLaws:
    """Fit curves by least squares.

    Args:
        sizes: rows, three different ones at least, all above 0.
        scores: [curves, sizes].
        limits: bounds of a, such as 0 and 1 for an accuracy.
        steps: of the golden section.
    """
    y = np.asarray(scores, dtype=float)
    largest = float(max(sizes))
    log_x = np.log(np.asarray(sizes, dtype=float) / largest)

    def error(c: Floats) -> Floats:
        u = np.exp(-c[..., None] * log_x)
        a, b = _best_line(u, y, limits)
        return np.asarray(((y - a[..., None] + b[..., None] * u) ** 2).sum(axis=-1), dtype=float)

    grid = np.geomspace(C_LOW, C_HIGH, GRID_POINTS)
    best = error(grid[:, None]).argmin(axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, GRID_POINTS - 1)]
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = error(left), error(right)
    for _ in range(steps):
        is_left = at_left <= at_right
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
        further = np.where(is_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        at_further = error(further)
        left, right = np.where(is_left, further, right), np.where(is_left, left, further)
        at_left, at_right = (
            np.where(is_left, at_further, at_right),
            np.where(is_left, at_left, at_further),
        )
    c = (low + high) / 2
    # The ends of the grid are never inside the interval that golden section narrows.
    ends = np.where(best == 0, C_LOW, np.where(best == GRID_POINTS - 1, C_HIGH, c))
    c = np.where(error(ends) <= error(c), ends, c)
    a, b = _best_line(np.exp(-c[:, None] * log_x), y, limits)
    return PowerLaws(a, a - b, c, largest)


def _best_line(u: Floats, y: Floats, limits: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return a within its limits, and b, that minimise the squares of y - (a - b * u) along the last axis.

    If the best a lies outside its limits, the best permitted one is the nearer limit: the sum of squares is
    convex.
    """
    mean_u, mean_y = u.mean(axis=-1), y.mean(axis=-1)
    centred = u - mean_u[..., None]
    b = -(centred * (y - mean_y[..., None])).sum(axis=-1) / (centred**2).sum(axis=-1)
    a = mean_y + b * mean_u
    bounded = np.clip(a, *limits)
    b_bounded = (u * (bounded[..., None] - y)).sum(axis=-1) / (u**2).sum(axis=-1)
    return bounded, np.where(a == bounded, b, b_bounded)


@dataclass(frozen=True, slots=True)
class HeldOutScores:
    """Scores of held-out prompts, by size and repetition.

    Attributes:
        values: [sizes, repetitions, prompts]: 1 or 0 for an accuracy, nats per token for a loss.
        weights: [prompts], of a prompt in the score of a student.
        strata: [prompts], number of the task; prompts are resampled within it.
    """

    values: Floats
    weights: Floats
    strata: npt.NDArray[np.int64]

    def means(self) -> Floats:
        """Return the scores [sizes, repetitions]: means over the prompts by their weights."""
        return np.asarray(self.values @ self.weights / self.weights.sum(), dtype=float)

    def resampled(self, draw: np.random.Generator, resamples: int) -> Floats:
        """Return scores [resamples, sizes] of resampled prompts and repetitions.

        Every size sees the same prompts in a resample, so differences between sizes are paired.
        """
        counts = np.zeros((resamples, len(self.weights)))
        for stratum in np.unique(self.strata):
            members = np.flatnonzero(self.strata == stratum)
            drawn = draw.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
            counts[:, members] = drawn
        weights = counts * self.weights
        scores = np.einsum("rp,stp->rst", weights, self.values, optimize=True)
        scores /= weights.sum(axis=1)[:, None, None]
        sizes, repetitions = self.values.shape[:2]
        chosen = draw.integers(repetitions, size=(resamples, sizes, repetitions))
        return np.asarray(np.take_along_axis(scores, chosen, axis=2).mean(axis=2), dtype=float)


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted curve with its bootstrap.

    Attributes:
        scores: [sizes], the measured means.
        best: one curve, fitted to `scores`.
        drawn: a curve for each resample.
        intervals: [sizes, 2], 95 % intervals of the measured means, from prompts and repetitions only.
        scatter: standard deviation of the scores about the curve beyond what the resampled prompts and
            repetitions explain: noise from one training to the next, or scores that follow another curve.
    """

    scores: Floats
    best: PowerLaws
    drawn: PowerLaws
    intervals: Floats
    scatter: float

    def gain(self, rows: float, further: float, sign: int) -> dict[str, float]:
        """Return the improvement that further rows are predicted to bring, with its 95 % interval.

        Args:
            sign: 1 where a higher score is better, -1 where a lower one is.
        """
        drawn = sign * (self.drawn.at(rows + further) - self.drawn.at(rows))
        low, high = percentiles(drawn)
        best = sign * (self.best.at(rows + further) - self.best.at(rows))
        return {"value": float(best[0]), "low": low, "high": high}


def percentiles(values: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval (Efron 1979): the 2.5 % and the 97.5 % quantile."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_fit(
    sizes: Sequence[float],
    scores: HeldOutScores,
    limits: tuple[float, float],
    *,
    resamples: int,
    seed: int = 0,
) -> Fit:
    """Fit a curve, and once more for each paired resample of prompts and repetitions.

    If the residuals are larger than resampling explains, normal noise of the size of the excess is added to
    the resampled scores before they are fitted.

    Args:
        sizes: `FEWEST_SIZES` different numbers of rows at least.
        limits: bounds of a.
    """
    draw: Any = np.random.default_rng(seed)
    measured = scores.means().mean(axis=1)
    best = fit(sizes, measured[None], limits)
    residuals = measured - np.array([best.at(size)[0] for size in sizes])
    drawn = scores.resampled(draw, resamples)
    refitted = fit(sizes, drawn, limits, steps=GOLDEN_STEPS_OF_RESAMPLES)
    of_drawn = drawn - np.stack([refitted.at(size) for size in sizes], axis=1)
    explained = ((of_drawn - residuals) ** 2).sum(axis=1).mean()
    excess = (residuals**2).sum() - explained
    intervals = np.percentile(drawn, [2.5, 97.5], axis=0).T
    scatter = float(np.sqrt(max(0.0, excess) / max(1, len(sizes) - 3)))
    if scatter > 0:
        drawn = drawn + draw.normal(0.0, scatter, size=drawn.shape)
        refitted = fit(sizes, drawn, limits, steps=GOLDEN_STEPS_OF_RESAMPLES)
    return Fit(measured, best, refitted, np.asarray(intervals, dtype=float), scatter)

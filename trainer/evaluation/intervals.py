"""Compute intervals and tests for scores of several models on the same prompts.

Means get percentile bootstrap intervals over prompts (Efron 1979); every model is drawn with the same
prompts, so differences are paired. Right and wrong answers are compared by McNemar's exact test. Where a few
prompts all give the same, their resamples do too: what is counted, and ratios of that, get intervals by
formulas that are no single point there. So do means of shares over fewer prompts than `FEW`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvester.quality.verifiers.wilson import Z95, wilson_limits

Values = NDArray[np.float64]
PERCENTILES = (2.5, 97.5)
# Fewer prompts than this show too little of how prompts differ to be resampled.
FEW = 10
# Resamples that differ by less are of prompts that all give the same: the rest is rounding.
_ROUNDING = 1e-9
# Counts that are held at a time, so that memory does not grow with the prompts: 4 million are 32 MB.
_MOST_COUNTS = 4_000_000


def resampled_sums(columns: Values, resamples: int, seed: int = 0) -> Values:
    """Draw rows with replacement and sum each column over them.

    Args:
        columns: [rows, columns], finite.

    Returns:
        [resamples, columns].
    """
    count = len(columns)
    draw = np.random.default_rng(seed)
    sums = []
    for piece in in_pieces(resamples, count):
        size = piece.stop - piece.start
        picked = draw.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        drawn = np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)
        sums.append(drawn @ columns)
    return np.concatenate(sums)


def in_pieces(resamples: int, count: int) -> Iterator[slice]:
    """Yield which resamples of `count` prompts are drawn together, so that few numbers are held at a time."""
    at_once = max(1, _MOST_COUNTS // max(count, 1))
    for begin in range(0, resamples, at_once):
        yield slice(begin, min(begin + at_once, resamples))


def estimate(value: float, drawn: Values) -> dict[str, float] | None:
    """Return a value with the 95 % interval of its resamples; those that are not finite are left out.

    Returns:
        None if the value itself, or all of its resamples, are not finite.
    """
    finite = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or not len(finite):
        return None
    low, high = np.percentile(finite, PERCENTILES)
    return {"value": float(value), "low": float(low), "high": float(high)}


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], resamples: int
) -> dict[str, float] | None:
    """Return sum of numerators / sum of denominators with its interval; None where it is not defined."""
    columns = np.array([numerators, denominators], dtype=np.float64).T
    if not len(columns):
        return None
    sums = resampled_sums(columns, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = columns.sum(axis=0)
        return estimate(float(np.divide(whole[0], whole[1])), sums[:, 0] / sums[:, 1])


def means(columns: Mapping[str, Sequence[float | None] | Values], resamples: int) -> dict[str, Any]:
    """Return each column's mean over the rows that have a value, with its interval.

    Args:
        columns: values of the same prompts, in one order; None or NaN: the prompt has none.

    Returns:
        By column `{value, low, high}`, or None for a column without a value.
    """
    drawn, whole = _mean_resamples(columns, resamples)
    return {name: estimate(whole[name], drawn[name]) for name in columns}


def difference_of_points(
    first: Sequence[float | None], second: Sequence[float | None]
) -> dict[str, float] | None:
    """Return the mean of first - second over the prompts that have both, with its paired 95 % interval.

    Args:
        first, second: points from 0 to 1, as 1 for a right answer and 0.5 for a tie.
    """
    pairs = [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return mean_of_differences(pairs) if pairs else None


def mean_of_differences(differences: Sequence[float]) -> dict[str, float]:
    """Return the mean of one or more differences from -1 to 1 with its 95 % interval, no single point.

    The interval is that of Bonett and Price (2012) for proportions: a prompt that counts 1 and one that
    counts -1 are added, then it is Wald's.
    """
    count = len(differences) + 2
    total = math.fsum(differences)
    middle = total / count
    variance = (math.fsum(value * value for value in differences) + 2) / count - middle * middle
    half = Z95 * math.sqrt(variance / count)
    value = total / len(differences)
    return {"value": value, "low": max(-1.0, middle - half), "high": min(1.0, middle + half)}


def is_point(low: float, high: float) -> bool:
    """Whether the limits of resamples of shares are one value, but for rounding."""
    return high - low < _ROUNDING


def mean_of_points(points: Sequence[float]) -> dict[str, float]:
    """Return the mean of one or more points from 0 to 1 with its 95 % interval, no single point.

    It is Wilson's interval for a share: points of that mean vary most where each is 0 or 1, so it is wide
    enough for any.
    """
    total = math.fsum(points)
    low, high = wilson_limits(total, len(points))
    return {"value": total / len(points), "low": low, "high": high}


def mean_of_groups(groups: Sequence[Mapping[str, float]], least: float = 0.0) -> dict[str, float]:
    """Return the mean of estimates that count alike, with limits combined by MOVER (Zou and Donner 2008).

    Args:
        groups: {value, low, high}, independent of each other. least: possible value; the most is 1.
    """
    count = len(groups)
    mean = sum(g["value"] for g in groups) / count
    down = math.sqrt(sum((g["value"] - g["low"]) ** 2 for g in groups)) / count
    up = math.sqrt(sum((g["high"] - g["value"]) ** 2 for g in groups)) / count
    return {"value": mean, "low": max(least, mean - down), "high": min(1.0, mean + up)}


def ratio_limits(
    first: float, second: float, of_first: tuple[float, float], of_second: tuple[float, float]
) -> tuple[float, float]:
    """Return the limits of first / second from the limits of each, by MOVER-R (Newcombe 2016).

    It takes both as independent. If they rise and fall together, the interval is wider than it need be.

    Args:
        first, of_first: an estimate, 0 or more, and its lower and upper limit.
        second, of_second: the same, all more than 0.
    """
    low, high = of_first
    below, above = of_second
    product = first * second
    down = math.sqrt(max(0.0, product**2 - low * above * (2 * first - low) * (2 * second - above)))
    up = math.sqrt(max(0.0, product**2 - high * below * (2 * first - high) * (2 * second - below)))
    # Not (product - down) / (above * (2 * second - above)), which is the same: both may be 0.
    least = low * (2 * first - low) / (product + down) if low > 0 else 0.0
    return least, (product + up) / (below * (2 * second - below))


def _mean_resamples(
    columns: Mapping[str, Sequence[float | None] | Values], resamples: int
) -> tuple[dict[str, Values], dict[str, float]]:
    width, count = len(columns), len(next(iter(columns.values()), ()))
    if not width or not count:
        return dict.fromkeys(columns, np.empty(0)), dict.fromkeys(columns, math.nan)
    # Values, with 0 for none, and whether there is one: filled column by column, as there may be many rows.
    # Their order in memory decides the last digits of sums: a single column is beside its second.
    both = np.empty((2 * width, count)).T if width > 1 else np.empty((count, 2))
    for place, column in enumerate(columns.values()):
        values = np.asarray(column, dtype=np.float64)  # None becomes NaN
        has_value = ~np.isnan(values)
        both[:, place], both[:, width + place] = np.where(has_value, values, 0.0), has_value
    sums, whole = resampled_sums(both, resamples), both.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn, mean = sums[:, :width] / sums[:, width:], whole[:width] / whole[width:]
    return (
        {name: drawn[:, place] for place, name in enumerate(columns)},
        {name: float(mean[place]) for place, name in enumerate(columns)},
    )


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float | int]:
    """Compare right answers of two models to the same prompts by McNemar's exact test (McNemar 1947).

    Returns:
        `only_first`, `only_second`, `both` and `neither`, counts of prompts; `p`, the two-sided binomial
        probability of a split at least this uneven if both were equally good.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    both = sum(a and b for a, b in zip(first, second, strict=True))
    return {
        "only_first": only_first,
        "only_second": only_second,
        "both": both,
        "neither": len(first) - only_first - only_second - both,
        "p": binomial_p(min(only_first, only_second), only_first + only_second),
    }


def binomial_p(fewer: int, count: int) -> float:
    """Return the two-sided p of `fewer` heads or fewer among `count` throws of a fair coin.

    Summed in logarithms, so that thousands of throws don't underflow.
    """
    if not count:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))

"""Compute intervals of accuracies in which tasks count alike, also where a task has too few prompts.

Prompts are resampled within their task. A task whose prompts all give the same gives it in each resample, and
a task of one prompt always does: an interval of resamples would claim a certainty that nobody has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from trainer.evaluation import intervals
from trainer.experiments.power_law import Floats

Strata = npt.NDArray[np.int64]
Estimate = dict[str, float]
Limits = tuple[float, float]


def fewest(strata: Strata) -> int:
    """Return how many prompts the smallest task has."""
    return int(np.unique(strata, return_counts=True)[1].min())


def accuracy(values: Floats, strata: Strata, of_resamples: Limits) -> Estimate:
    """Return an accuracy {value, low, high}: limits of resamples, or wider ones where these claim too much.

    Args:
        values: [prompts], 0 to 1. strata: [prompts], number of the task.
    """
    return _estimate(values, strata, of_resamples, intervals.mean_of_points, 0.0)


def difference(first: Floats, second: Floats, strata: Strata, of_resamples: Limits) -> Estimate:
    """Return the paired difference of two accuracies, in the same way."""

    return _estimate(first - second, strata, of_resamples, intervals.mean_of_differences, -1.0)


def _estimate(
    values: Floats,
    strata: Strata,
    of_resamples: Limits,
    of_task: Callable[[Sequence[float]], Estimate],
    least: float,
) -> Estimate:
    tasks = [of_task(values[strata == task].tolist()) for task in np.unique(strata)]
    found = intervals.mean_of_groups(tasks, least)
    low, high = of_resamples
    if too_few(fewest(strata)) or intervals.is_point(low, high):
        low, high = min(low, found["low"]), max(high, found["high"])
    return {"value": found["value"], "low": low, "high": high}


def too_few(prompts: int) -> bool:
    """Whether resamples of so many prompts tell too little of others."""
    return prompts < intervals.FEW


def few_note(prompts: int, of_what: str = "held-out prompts") -> list[str]:
    """Return the line on intervals that resample too few prompts, if they are too few."""
    if not too_few(prompts):
        return []
    return [
        f"{prompts:,} {of_what} are too few to resample: intervals that do so are too narrow, and one whose "
        f"ends are equal says nothing; hold out {intervals.FEW:,} or more"
    ]

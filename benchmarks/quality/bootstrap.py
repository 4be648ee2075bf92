"""Compute paired bootstrap intervals over held-out prompts and seeds.

Every arm answers the same prompts and has the same seeds. A resample draws prompts within each task, and
seeds, once for all arms, so differences are paired (Efron 1979). An arm is an array [seeds, prompts,
features] of sums; a metric is a function of their totals, which makes recovery, loss and calibration error
alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class Bootstrap:
    """Resamples of the prompts of one held-out split.

    Args:
        tasks: the task of each prompt.

    Attributes:
        task_of: the same, as an array.
        tasks: each task once.
    """

    def __init__(self, tasks: Sequence[str], resamples: int = 2000, seed: int = 0) -> None:
        self.task_of = np.array(tasks)
        self.tasks = sorted(set(tasks))
        self._seed = seed
        random = np.random.default_rng(seed)
        # How often each resample holds each prompt.
        self._times = np.zeros((resamples, len(tasks)))
        for task in self.tasks:
            of_task = np.flatnonzero(self.task_of == task)
            drawn = random.multinomial(len(of_task), np.full(len(of_task), 1 / len(of_task)), size=resamples)
            self._times[:, of_task] = drawn

    def macro_weights(self) -> Array:
        """Return a weight for each prompt by which a sum over prompts is the mean over the tasks."""
        counts = {task: int((self.task_of == task).sum()) for task in self.tasks}
        return np.array([1 / counts[task] / len(self.tasks) for task in self.task_of])

    def totals(self, arm: Array) -> Array:
        """Return totals [1 + resamples, features], the mean over seeds; the first are those as measured."""
        seeds = len(arm)
        random = np.random.default_rng([self._seed, seeds])
        picks = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(self._times)) / seeds
        drawn = sum(picks[:, at, None] * (self._times @ arm[at]) for at in range(seeds))
        return np.concatenate([arm.mean(axis=0).sum(axis=0)[None], drawn])

    def interval(self, values: Array) -> Interval:
        """Return the interval of a metric of `totals`, or of a difference or ratio of two."""
        low, high = np.percentile(values[1:], [2.5, 97.5])
        return Interval(float(values[0]), float(low), float(high))

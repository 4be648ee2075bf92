"""Estimate which share of its limits an endpoint could use. Pure.

While its requests wait for the rate it could use all that it gets, else a little more than it uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from harvester.teacher.limiter.rate_limiter import Limiter

# Who waited for the rate in at least this part of the time could use a larger share.
WAITED_PART = 0.5
# What is used is an average over this time.
USE_S = 2.0
# Below so many units in that time, what was used of a share says nothing about what could be.
FEWEST_UNITS = 4.0


@dataclass(slots=True)
class Demand:
    """Measures one endpoint since the last call of `fraction`.

    Attributes:
        headroom: how many times what it uses it wants while nobody waits.
        growth: how many times what it uses it wants while its requests wait for the rate, infinity for all
            that there is.
        measured_at: monotonic seconds of that call.
        taken: units taken so far, by limit, then.
        used: the part of each limit in force that was used, times the share that it was of the whole, on an
            average over USE_S.
        waited_s: how long requests had waited for the rate then.
    """

    limiter: Limiter
    headroom: float
    measured_at: float = 0.0
    growth: float = math.inf
    taken: Mapping[str, float] = field(default_factory=dict)
    used: dict[str, float] = field(default_factory=dict)
    waited_s: float = 0.0

    def fraction(self, share: float, now: float) -> float:
        """Return the fraction of the whole limits that could be used, infinity for all that there is.

        Args:
            share: the fraction that it had meanwhile.
        """
        seconds, self.measured_at = now - self.measured_at, now
        total_s = self.limiter.rate_waits.total_s(now)
        waited_s, self.waited_s = total_s - self.waited_s, total_s
        buckets = {key.label: bucket for key, bucket in self.limiter.buckets.items() if not key.lasts_longer}
        before, self.taken = self.taken, {name: bucket.taken for name, bucket in buckets.items()}
        if not buckets or seconds <= 0 or before.keys() != buckets.keys():
            self.used = {}
            return math.inf
        for name, bucket in buckets.items():
            part = max(0.0, self.taken[name] - before[name]) / (bucket.rate * seconds) * share
            weight = 1 - math.exp(-seconds / USE_S)
            self.used[name] = self.used.get(name, part) * (1 - weight) + part * weight
        used = max(self.used.values())
        if waited_s < WAITED_PART * seconds:
            return used * self.headroom
        if any(bucket.rate * USE_S < FEWEST_UNITS for bucket in buckets.values()):
            return math.inf
        return used * self.growth if used else math.inf

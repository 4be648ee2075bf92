"""Notice that more requests are refused than usual, by a cumulative sum over the sends. Pure.

CUSUM: E. S. Page, Continuous Inspection Schemes, Biometrika 41, 1954.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harvester.teacher.limiter.sends import Entry

# A share of refusals that is tolerated beyond the unrelated ones: at least, and as a share of those.
TOLERATED = 0.01
TOLERATED_SHARE = 0.2
# The cumulative sum at which a surplus of refusals counts as found: this at least (three refusals), and more
# where unrelated refusals scatter, so that one false alarm comes in about this many sends.
LEAST_SURPLUS = 2.0
SENDS_PER_FALSE_ALARM = 1500


@dataclass(slots=True)
class RefusalSurplus:
    """The cumulative sum of refusals beyond the share that is tolerated.

    Attributes:
        since: when the first refusal of the sum was sent, infinity for none.
    """

    since: float = math.inf
    _score: float = 0.0
    _number: int = 0  # of the last refused send

    def add(self, entry: Entry, unrelated: float) -> None:
        """Add a refused send.

        Args:
            unrelated: share of requests that is refused whatever the rate.
        """
        tolerated = _tolerated(unrelated)
        passed = max(0, entry.number - self._number - 1)
        self._number = max(self._number, entry.number)
        self._score -= tolerated * passed
        if self._score <= 0:
            self._score, self.since = 0.0, entry.at
        self.since = min(self.since, entry.at)
        self._score += 1 - tolerated

    def is_found(self, unrelated: float) -> bool:
        """Whether more were refused than chance explains (Siegmund's approximation of the false alarms)."""
        return self._score >= _enough(unrelated)

    def reset(self) -> None:
        """Begin a new sum."""
        self._score, self.since = 0.0, math.inf


def _tolerated(unrelated: float) -> float:
    return unrelated + max(TOLERATED, TOLERATED_SHARE * unrelated)


def _enough(unrelated: float) -> float:
    variance = unrelated * (1 - unrelated)
    if variance <= 0:
        return LEAST_SURPLUS
    slack = _tolerated(unrelated) - unrelated
    per_alarm = SENDS_PER_FALSE_ALARM * 2 * slack**2 / variance
    return max(LEAST_SURPLUS, variance / (2 * slack) * math.log1p(per_alarm))

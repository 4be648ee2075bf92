"""Measure how many requests were sent per second of late, on an exponential average. Pure."""

from __future__ import annotations

import math

# The average is over this many seconds, as in RFC 7661; the first ones count for this much at least.
FLOW_S = 3.0
LEAST_FLOW_S = 0.1


class SendFlow:
    """Sends per second of late. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self._per_s = 0.0
        self._at = now
        self._since = math.inf

    def sent(self, at: float) -> None:
        """Record a send."""
        self._per_s = self._decayed(at) + 1 / FLOW_S
        self._at = at
        self._since = min(self._since, at)

    def per_s(self, now: float) -> float:
        """Return sends per second; in the first seconds, on average since the first send."""
        covered = 1 - math.exp(-max(now - self._since, LEAST_FLOW_S) / FLOW_S)
        return self._decayed(now) / covered

    def _decayed(self, now: float) -> float:
        return self._per_s * math.exp(-max(0.0, now - self._at) / FLOW_S)

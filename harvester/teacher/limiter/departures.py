"""Space the departures of requests that were admitted. Pure.

An attempt is on disk before it is sent, and records are committed in groups (`store.journal.group_commit`).
So requests that were admitted one after the other become ready several at a time, and after a slow fsync
dozens at once. A teacher with a small burst would refuse some of them, although the rate is right. Departures
are therefore spaced once more: a cell rate algorithm (GCRA, ITU-T I.371) with the rate of requests that holds
now and the burst that was learned. What comes late because a timer or the event loop was late is caught up
with, within that burst.

Where no rate is known yet, the number sent grows e-fold in RAMP_S, so that the first refusals are read before
hundreds have left.
"""

from __future__ import annotations

import math

# Where no rate is known: departures that may happen at once at first, the time in which their number grows
# e-fold, and how much of that may be caught up with after a standstill.
FIRST_DEPARTURES = 16
RAMP_S = 0.07
RAMP_BURST_S = 0.02


class Departures:
    """Schedule of departures at one endpoint. Times are monotonic seconds.

    Attributes:
        count: departures so far.
        waiting: admitted requests that have not departed.
    """

    def __init__(self, now: float) -> None:
        self.count = 0
        self.waiting = 0
        # When the next request would depart if there were no burst (theoretical arrival time).
        self._due_at = now

    def wait_s(self, now: float, rate: float, burst_s: float) -> float:
        """Return seconds until the next one may depart.

        Args:
            rate: requests per second, infinity where none is known.
            burst_s: seconds of the rate that may leave at once.
        """
        if rate == math.inf:
            if self.count < FIRST_DEPARTURES:
                return 0.0
            burst_s = RAMP_BURST_S
        return max(0.0, self._due_at - burst_s - now)

    def admitted(self) -> None:
        """Note that a request was admitted: it waits for its departure."""
        self.waiting += 1

    def withdrawn(self) -> None:
        """Note that an admitted request will not be sent."""
        self.waiting -= 1

    def departed(self, now: float, rate: float) -> None:
        """Note a departure."""
        self.count += 1
        self.waiting -= 1
        if rate == math.inf:
            rate = max(FIRST_DEPARTURES, self.count) / RAMP_S
        self._due_at = max(self._due_at, now) + 1 / rate

    def scale(self, ratio: float, now: float, burst_s: float) -> None:
        """Divide the wait for the next departure by this ratio: the rate has become so much higher.

        Without that a departure at a low rate would delay the next one by the time that the low rate needs.
        """
        earliest = now + burst_s
        if self._due_at > earliest:
            self._due_at = earliest + (self._due_at - earliest) / ratio

    def end_burst(self, now: float, burst_s: float) -> None:
        """Let the next requests depart one by one, after a pause or a refusal."""
        self._due_at = max(self._due_at, now + burst_s)

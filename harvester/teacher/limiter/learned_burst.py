"""Learn how many requests a teacher takes at once, as seconds of its rate. Pure.

A burst is sent only to catch up after a standstill of our own (a slow fsync, a busy machine). One that meets
a refusal, although the rate is right, halves what is sent at once. Standstills that were caught up with
without a refusal let it grow again: quickly to just below the size that was refused, then ever more slowly.
"""

from __future__ import annotations

import math

# Seconds of the rate that may be sent at once: at first, at least, at most.
FIRST_BURST_S = 0.1
LEAST_BURST_S = 0.004
MOST_BURST_S = 0.25
# A standstill of this share of the burst is caught up with in a burst of nearly full size.
FULL_SHARE = 0.8
# This many of them without a refusal let the burst grow by this factor. Where that would reach the size that
# was refused, twice as many are needed each time.
CLEAN_CATCH_UPS = 5
GROWTH = 1.25
# A longer gap between two sends is no standstill of ours: nothing was to be sent.
LONGEST_GAP_S = 2.0


class LearnedBurst:
    """How much may be sent at once.

    Attributes:
        seconds: seconds of the rate that may be sent at once.
    """

    def __init__(self) -> None:
        self.seconds = FIRST_BURST_S
        self._refused_s = math.inf
        self._catch_ups = 0
        self._needed = CLEAN_CATCH_UPS
        self._sent_at = -math.inf

    def sent(self, now: float) -> None:
        """Note a send; the gap before it may be a standstill that is being caught up with."""
        gap_s, self._sent_at = now - self._sent_at, now
        if not FULL_SHARE * self.seconds <= gap_s <= LONGEST_GAP_S:
            return
        self._catch_ups += 1
        # The one that is being caught up with now has not been accepted yet.
        if self._catch_ups <= (self._needed if GROWTH * self.seconds >= self._refused_s else CLEAN_CATCH_UPS):
            return
        self._catch_ups = 0
        self.seconds = min(MOST_BURST_S, GROWTH * self.seconds)

    def refused(self) -> bool:
        """Halve the burst after a refusal of one; returns whether it could be halved."""
        if self.seconds <= LEAST_BURST_S:
            return False
        if self.seconds >= self._refused_s:
            self._needed *= 2
        self._refused_s = self.seconds
        self.seconds /= 2
        self._catch_ups = 0
        return True

    def resume(self, seconds: float) -> None:
        """Continue from what an earlier process learned."""
        self.seconds = min(MOST_BURST_S, max(LEAST_BURST_S, seconds))

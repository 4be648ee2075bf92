"""Learn a request rate from refusals (HTTP 429) where the teacher states no limit. Pure.

A refusal sets the rate to 95 % of what was accepted in the last second. From there the rate grows slowly at
first and then ever faster, as CUBIC grows a congestion window (RFC 9438): it stays near a limit that has not
changed, and finds a limit that was raised within about ten seconds.
"""

from __future__ import annotations

from collections import deque

# The rate after a refusal, as a share of the accepted rate.
CUT_TO = 0.95
# Relative growth per second is GROWTH_PER_S + ACCELERATION * t**2, t seconds after a cut: 4 % in total after
# 3 s, twofold after 9 s.
GROWTH_PER_S = 0.005
ACCELERATION = 0.003
# The accepted rate is measured over the short span if it holds ENOUGH entries, else over the long one if it
# holds at least FEWEST; with fewer nothing is learned.
SHORT_S, LONG_S = 1.0, 10.0
ENOUGH = 20
FEWEST = 3


class LearnedRate:
    """A learned rate in requests per second, None until a refusal set one. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.rate: float | None = None
        self._accepted: deque[float] = deque()
        self._started_at = now
        self._cut_at = now
        self._grown_at = now

    def accepted(self, entered_at: float) -> None:
        """Record that the request admitted at `entered_at` was answered."""
        self._accepted.append(entered_at)
        while self._accepted[0] < entered_at - 2 * LONG_S:
            self._accepted.popleft()

    def refused(self, entered_at: float, now: float) -> bool:
        """Lower the rate after the request admitted at `entered_at` was refused.

        Returns:
            False when nothing was learned: its round trip had its cut, or too few answers are known.
        """
        if self.rate is not None and entered_at <= self._cut_at:
            return False
        accepted = self._accepted_per_s(now)
        if accepted is None:
            return False
        self.rate = CUT_TO * (accepted if self.rate is None else min(accepted, self.rate))
        self._cut_at = self._grown_at = now
        return True

    def resume(self, rate: float, now: float) -> None:
        """Continue from a rate that an earlier process learned."""
        self.rate = rate
        self._cut_at = self._grown_at = now

    def _accepted_per_s(self, now: float) -> float | None:
        last = self._accepted[-1] if self._accepted else now
        for span_s, fewest in ((SHORT_S, ENOUGH), (LONG_S, FEWEST)):
            count = sum(at > last - span_s for at in self._accepted)
            if count >= fewest:
                return count / min(span_s, max(now - self._started_at, SHORT_S))
        return None

    def grow(self, now: float) -> float | None:
        """Let the rate grow up to `now` and return it."""
        if self.rate is not None and now > self._grown_at:
            since, until = self._grown_at - self._cut_at, now - self._cut_at
            # The integral of the growth per second from `since` to `until`.
            step = GROWTH_PER_S * (until - since) + ACCELERATION * (until**3 - since**3) / 3
            self.rate *= 1 + min(step, 1.0)
            self._grown_at = now
        return self.rate

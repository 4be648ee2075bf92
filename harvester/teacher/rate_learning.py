"""Requests per second where nobody tells the limit: learned from refusals, pure.

A refusal sets the rate a little below what was accepted in the last second; from there it grows slowly at
first and then ever faster (as CUBIC grows a window, RFC 9438), so that it stays near a limit that stands and
finds one that was raised within ten seconds.
"""

from __future__ import annotations

from collections import deque

CUT_TO = 0.95
GROWTH_PER_S = 0.005
ACCELERATION = 0.003
"""Relative growth per second is 0.005 + 0.003 t^2, t seconds after a cut: 4 % at 3 s, twofold at 9 s."""
SHORT_S, LONG_S = 1.0, 10.0
ENOUGH = 20
FEWEST = 3


class LearnedRate:
    """The learned rate; None until a refusal taught one. Times are monotonic seconds."""

    def __init__(self, now: float) -> None:
        self.rate: float | None = None
        self._accepted: deque[float] = deque()
        self._begun_at = now
        self._cut_at = now
        self._grown_at = now

    def accepted(self, entered_at: float) -> None:
        """An answer came to a request that was let in then; kept for ten seconds of entries."""
        self._accepted.append(entered_at)
        while self._accepted[0] < entered_at - 2 * LONG_S:
            self._accepted.popleft()

    def refused(self, entered_at: float, now: float) -> bool:
        """Too fast; False when nothing was learned: this round had its cut, or too little is known."""
        if self.rate is not None and entered_at <= self._cut_at:
            return False
        seen = self._seen(now)
        if seen is None:
            return False
        self.rate = CUT_TO * (seen if self.rate is None else min(seen, self.rate))
        self._cut_at = self._grown_at = now
        return True

    def resume(self, rate: float, now: float) -> None:
        """Go on from a rate that an earlier process learned."""
        self.rate = rate
        self._cut_at = self._grown_at = now

    def _seen(self, now: float) -> float | None:
        """Accepted entries per second over the last second, or ten where they are few."""
        last = self._accepted[-1] if self._accepted else now
        for span_s, fewest in ((SHORT_S, ENOUGH), (LONG_S, FEWEST)):
            count = sum(at > last - span_s for at in self._accepted)
            if count >= fewest:
                return count / min(span_s, max(now - self._begun_at, SHORT_S))
        return None

    def grow(self, now: float) -> float | None:
        """The rate now."""
        if self.rate is not None and now > self._grown_at:
            since, until = self._grown_at - self._cut_at, now - self._cut_at
            step = GROWTH_PER_S * (until - since) + ACCELERATION * (until**3 - since**3) / 3
            self.rate *= 1 + min(step, 1.0)
            self._grown_at = now
        return self.rate

"""Stop sending to an endpoint that is down, and probe it with single requests until it answers. Pure.

The breaker opens after five failures in a row that belong to different requests, or that never reached the
teacher; the same request failing again and again opens nothing, for the request itself may be the cause.
While open, nothing is sent for a second, then one probe goes out; each failed probe doubles the pause, up to
a minute. Any answer closes the breaker. (The pattern: M. Nygard, "Release It!", 2nd edition, section 5.2.)
"""

from __future__ import annotations

# Failures in a row that open the breaker.
IN_A_ROW = 5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class CircuitBreaker:
    """Counts the failures in a row of one endpoint. Times are monotonic seconds.

    Attributes:
        is_open: whether only probes may be sent.
        down_since: the first failure since the last answer, None when there is none.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.down_since: float | None = None
        self._opened_at = 0.0
        self._failed_keys: set[bytes] = set()
        self._unreached = 0
        self._pause_s = FIRST_PAUSE_S

    def answered(self) -> None:
        """Close the breaker and forget all failures: an answer came."""
        self.is_open = False
        self.down_since = None
        self._failed_keys.clear()
        self._unreached = 0
        self._pause_s = FIRST_PAUSE_S

    def failed(self, key: bytes, entered_at: float, now: float, *, reached: bool) -> float | None:
        """Count a failure that is not the request's own fault.

        Args:
            key: which request failed.
            entered_at: when it was admitted; one admitted before the breaker opened counts no further.
            reached: False when nothing left this machine, which can't be the request's fault.

        Returns:
            Seconds during which nothing may be sent, None when sending may go on.
        """
        if self.is_open and entered_at <= self._opened_at:
            return None
        self.down_since = now if self.down_since is None else self.down_since
        self._failed_keys.add(key)
        self._unreached += not reached
        if not self.is_open and max(len(self._failed_keys), self._unreached) < IN_A_ROW:
            return None
        pause_s = self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self.is_open, self._opened_at = True, now
        return pause_s

    def restart_timer(self, now: float) -> None:
        """Count the down time from `now`: the pass was on hold, so nothing was tried meanwhile."""
        self.down_since = None if self.down_since is None else now

    def down_s(self, now: float) -> float:
        """Return seconds since the first failure while the breaker is open, else 0."""
        return 0.0 if self.down_since is None or not self.is_open else now - self.down_since

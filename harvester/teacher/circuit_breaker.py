"""Tells a broken endpoint from a poison row: opens when nobody gets through, lets one through to look. Pure.

Five failures in a row of different requests, or of requests that never reached the teacher, open it: nobody
is let in for a second, then for twice as long after each failed look, up to a minute. Any answer closes it.
"""

from __future__ import annotations

IN_A_ROW = 5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class CircuitBreaker:
    """Failures in a row of one endpoint. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.is_open = False
        self.down_since: float | None = None
        self._opened_at = 0.0
        self._failed: set[bytes] = set()
        self._unreached = 0
        self._pause_s = FIRST_PAUSE_S

    def answered(self) -> None:
        """Somebody got through: all is forgotten."""
        self.is_open = False
        self.down_since = None
        self._failed.clear()
        self._unreached = 0
        self._pause_s = FIRST_PAUSE_S

    def failed(self, key: bytes, entered_at: float, now: float, *, reached: bool) -> float | None:
        """A request failed for no fault of its own; returns for how long nobody may enter, None: go on.

        Args:
            entered_at: when it was let in; what was let in before the opening is old news.
            reached: False when nothing left this machine, which can't be the request's fault.
        """
        if self.is_open and entered_at <= self._opened_at:
            return None
        self.down_since = now if self.down_since is None else self.down_since
        self._failed.add(key)
        self._unreached += not reached
        if not self.is_open and max(len(self._failed), self._unreached) < IN_A_ROW:
            return None
        pause_s = self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self.is_open, self._opened_at = True, now
        return pause_s

    def forgive(self, now: float) -> None:
        """Nobody tried for a while, on purpose: the time down counts from now on."""
        self.down_since = None if self.down_since is None else now

    def down_s(self, now: float) -> float:
        """Seconds since the first failure of this row, 0 while answers come."""
        return 0.0 if self.down_since is None or not self.is_open else now - self.down_since

"""Measure how long requests wait for a limit on the rate. Pure.

A harvest in which some wait for it can use a larger share of the limit.
"""

from __future__ import annotations


class RateWaits:
    """Time in which at least one request waited for the rate. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._count = 0
        self._total_s = 0.0
        self._since = 0.0

    def begin(self, now: float) -> None:
        """Note that a request begins to wait; every `begin` needs exactly one `end`."""
        if not self._count:
            self._since = now
        self._count += 1

    def end(self, now: float) -> None:
        """Note that a request waits no more: it may be sent, or was withdrawn."""
        self._count -= 1
        if not self._count:
            self._total_s += max(0.0, now - self._since)

    def total_s(self, now: float) -> float:
        """Return the seconds so far, with those of requests that wait now."""
        return self._total_s + (max(0.0, now - self._since) if self._count else 0.0)

"""Measure how many answers of an endpoint come per minute, and how long they take. Pure."""

from __future__ import annotations

from collections import deque

# The rate is that of about the last minute.
SPAN_S = 60.0
# Share of a new latency in the average.
WEIGHT = 0.05


class AnswerPace:
    """Answers of one endpoint. Times are monotonic seconds.

    Attributes:
        count: answers so far.
        latency_s: average of the last ones, from sending to the last byte; None before the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.latency_s: float | None = None
        # Time and count, at most once a second.
        self._marks: deque[tuple[float, int]] = deque()

    def answered(self, now: float, latency_s: float) -> None:
        """Count an answer."""
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, self.count))
        while now - self._marks[0][0] > SPAN_S:
            self._marks.popleft()
        self.count += 1
        before = latency_s if self.latency_s is None else self.latency_s
        self.latency_s = before + WEIGHT * (latency_s - before)

    def per_minute(self, now: float) -> float:
        """Return answers per minute, over the last minute or what there is of it."""
        marks = [mark for mark in self._marks if now - mark[0] <= SPAN_S]
        if not marks:
            return 0.0
        at, count = marks[0]
        return 60 * (self.count - count) / max(now - at, 1.0)

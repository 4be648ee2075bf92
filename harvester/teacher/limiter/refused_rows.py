"""Tell a row that is refused alone from a teacher that refuses everybody. Pure.

A row that is refused again and again while other rows are accepted is at fault itself: it may be larger than
the whole allowance, or meet a defect of the server. It gets a bounded number of tries, and teaches nothing
about the teacher's limits.
"""

from __future__ import annotations

from dataclasses import dataclass

# A row is at fault after this many refusals while others were accepted ...
MOST_TRIES_ALONE = 8
# ... or after MOST_TRIES with nothing else to compare with, over LONGEST_ALONE_S.
MOST_TRIES = 10
LONGEST_ALONE_S = 120.0
# From this refusal on, one that comes while others are accepted teaches nothing about the limits.
SUSPICIOUS_TRIES = 2
# Wait before the next try of a refused row: doubles with each refusal, up to the longest.
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0
# A wait that the teacher names for one row is honoured up to this. A longer one holds everybody.
LONGEST_NAMED_WAIT_S = 60.0


@dataclass(slots=True)
class _Row:
    first_at: float
    tries: int = 0
    alone: int = 0


class RefusedRows:
    """The rows that are being refused, by key."""

    def __init__(self, patience_s: float) -> None:
        self._rows: dict[bytes, _Row] = {}
        self._longest_s = min(LONGEST_ALONE_S, patience_s)

    def refused(self, key: bytes, now: float, *, others_accepted: bool) -> None:
        """Count a refusal.

        Args:
            others_accepted: whether other rows were accepted at about the same time.
        """
        row = self._rows.setdefault(key, _Row(now))
        row.tries += 1
        row.alone += others_accepted

    def forget(self, key: bytes) -> None:
        """Forget a row that was answered or given up."""
        if self._rows:
            self._rows.pop(key, None)

    def is_suspicious(self, key: bytes) -> bool:
        """Whether the refusals of this row say nothing about the limits any more."""
        return key in self._rows and self._rows[key].alone >= SUSPICIOUS_TRIES

    def is_at_fault(self, key: bytes, now: float) -> bool:
        """Whether the row has had all its tries."""
        row = self._rows[key]
        if row.alone >= MOST_TRIES_ALONE:
            return True
        return row.alone > 0 and row.tries >= MOST_TRIES and now - row.first_at >= self._longest_s

    def wait_s(self, key: bytes, named_s: float | None) -> float:
        """Return seconds until the next try: as named; at least the back-off if that was wrong before."""
        tries = self._rows[key].tries
        backoff_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(tries - 1, 10))
        if named_s is None:
            return backoff_s
        return min(LONGEST_NAMED_WAIT_S, named_s if tries == 1 else max(named_s, backoff_s))

"""Keep the last sends to one endpoint with what became of each, and count them. Pure.

Times are monotonic seconds. Refusals come back within milliseconds, answers take as long as they take: a send
that is older than one that was refused, and was not refused itself, counts as accepted.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice, pairwise

# Sends this close to another one are compared with it.
NEAR_S = 1.0
# ... or, where there are none, the last few within this time.
FAR_S = 30.0
FEW_SENDS = 6
# A number in flight is limited if, of the last LEVEL_SENDS, at least LEAST_REFUSED were refused from it on,
# and at most this share was accepted there, and at most this share was refused below it.
LEAST_REFUSED = 3
LEVEL_SENDS = 200
MIXED_SHARE = 0.1
# ... and if that happened at this many separate moments: one burst that is refused says nothing about the
# number in flight.
LEAST_MOMENTS = 3
# ... and if as many that were sent since the first of these refusals are answered. As long as no answer
# comes, the number in flight only grows, and so does everything else.
LEAST_ANSWERED = 2
# Refusals that confirm such a number once it is known.
LEAST_CONFIRMED = 2
LOG_SENDS = 20_000
# A refusal is late if it took this many times as long as the quickest ones, and this many seconds longer. The
# quickest are forgotten: what counts as quick grows by a factor with each refusal.
LATE = 3.0
LATE_S = 0.005
QUICK_GROWTH = 1.02


class Reception(Enum):
    """What is known of one send."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    DISREGARDED = "disregarded"


@dataclass(slots=True, eq=False)
class Entry:
    """One admitted request: when it was sent, and how many were in flight then, itself included.

    Until it is sent, both hold for its admission. `number` counts the sends from 1. `is_late` says that its
    refusal came later than others: the teacher, or we, stood still meanwhile.
    """

    at: float
    in_flight: int = 1
    outcome: Reception = Reception.PENDING
    number: int = 0
    is_late: bool = False

    @property
    def has_departed(self) -> bool:
        """Whether it was sent."""
        return self.number > 0

    @property
    def is_refused(self) -> bool:
        """Whether it was refused for a reason that may be the rate."""
        return self.outcome is Reception.REFUSED


class SendLog:
    """The last sends, oldest first.

    Attributes:
        refusal_delay_s: seconds after which a refusal comes back, on average.
        count: sends so far.
    """

    def __init__(self) -> None:
        self.refusal_delay_s = 0.0
        self._quick_s = math.inf
        self._log: deque[Entry] = deque(maxlen=LOG_SENDS)
        self.count = 0
        # Only sends after this say something about a limit on the number in flight.
        self._level_at = -math.inf

    def add(self, entry: Entry) -> None:
        """Record a send."""
        self.count += 1
        entry.number = self.count
        self._log.append(entry)

    def refused(self, entry: Entry, now: float) -> None:
        """Mark a send as refused."""
        entry.outcome = Reception.REFUSED
        delay_s = now - entry.at
        entry.is_late = delay_s > LATE * self._quick_s and delay_s > self._quick_s + LATE_S
        self._quick_s = min(QUICK_GROWTH * self._quick_s, delay_s)
        self.refusal_delay_s += 0.3 * (delay_s - self.refusal_delay_s)

    def newest_first(self, since: float) -> Iterator[Entry]:
        """Yield the sends after `since`, the newest first."""
        for entry in reversed(self._log):
            if entry.at <= since:
                return
            yield entry

    def counts(self, since: float, until: float) -> tuple[int, int]:
        """Return how many sends after `since`, up to `until`, were not refused, and how many were refused.

        Refusals that were about their row alone count as neither.
        """
        accepted = refused = 0
        for entry in self.newest_first(since):
            if entry.at > until or entry.outcome is Reception.DISREGARDED:
                continue
            if entry.outcome is Reception.REFUSED:
                refused += 1
            else:
                accepted += 1
        return accepted, refused

    def has_late(self, since: float, until: float) -> bool:
        """Whether one of the sends from `since` to `until` was refused late."""
        return any(entry.is_late for entry in self.newest_first(since - 1e-9) if entry.at <= until)

    def answered_since(self, since: float) -> int:
        """Return how many of the requests sent after `since` are answered."""
        return sum(entry.outcome is Reception.ACCEPTED for entry in self.newest_first(since))

    def begin_of(self, sends: int, until: float) -> float:
        """Return when the last `sends` sends up to `until` began."""
        begun_at = until
        for entry in reversed(self._log):
            if entry.at > until:
                continue
            begun_at = entry.at
            sends -= 1
            if sends <= 0:
                break
        return begun_at

    def refused_in_a_row(self, now: float, since: float = -math.inf) -> tuple[int, float, float]:
        """Return how many of the last sends after `since` were all refused, and when the first and last left.

        Sends so young that their refusals may still come are left out.
        """
        run, first_at, last_at = 0, math.inf, -math.inf
        young_at = now - 2 * self.refusal_delay_s - 0.005
        for entry in self.newest_first(since):
            if not entry.is_refused:
                if run == 0 and entry.outcome is Reception.PENDING and entry.at > young_at:
                    continue
                break
            run, first_at, last_at = run + 1, entry.at, max(last_at, entry.at)
        return run, first_at, last_at

    def others_accepted(self, entry: Entry) -> bool:
        """Whether requests that were sent at about the same time as this one were mostly accepted."""
        near = [other for other in self.newest_first(entry.at - NEAR_S) if other is not entry]
        if not near:  # little is sent: the last few others
            last = islice(self.newest_first(entry.at - FAR_S), FEW_SENDS)
            near = [other for other in last if other is not entry]
        outcomes = [other.outcome for other in near if other.at <= entry.at + NEAR_S]
        accepted, refused = outcomes.count(Reception.ACCEPTED), outcomes.count(Reception.REFUSED)
        return accepted > 0 and refused <= accepted

    def moments(self, since: float) -> int:
        """Return how many times after `since` a send was refused and the one before it was not."""
        return len(self._first_refused(self.newest_first(since)))

    @staticmethod
    def _first_refused(newest_first: Iterable[Entry]) -> list[Entry]:
        """The sends that were refused when the one before was not."""
        return [one for one, before in pairwise(newest_first) if one.is_refused and not before.is_refused]

    @staticmethod
    def _answered_since_refused(entries: list[Entry], level: int) -> int:
        """How many of these sends are answered that were sent after the first refusal from `level` on."""
        first_at = min(entry.at for entry in entries if entry.is_refused and entry.in_flight >= level)
        return sum(entry.outcome is Reception.ACCEPTED and entry.at > first_at for entry in entries)

    def forget_levels(self, now: float) -> None:
        """Use only later sends, from now on, to judge a limit on the number in flight."""
        self._level_at = now

    def refused_level(self, known: int | None = None) -> int | None:
        """Return the number in flight that seems to be one too many, None where there is none.

        From it on nearly every request is refused, and below it hardly any, at several separate moments. A
        limit on the rate refuses at the same numbers in flight at which it accepts.

        Args:
            known: such a number that was found before: a few refusals from it on are enough.
        """
        last = list(islice(self.newest_first(self._level_at), LEVEL_SENDS))
        if known is not None:
            above = [entry.is_refused for entry in last if entry.in_flight >= known]
            if sum(above) >= LEAST_CONFIRMED and 2 * sum(above) >= len(above):
                return known
        firsts = self._first_refused(last)
        if len(firsts) < LEAST_MOMENTS:
            return None
        last.sort(key=lambda entry: entry.in_flight)
        total = sum(entry.is_refused for entry in last)
        refused_below = 0
        for below, entry in enumerate(last):
            if not entry.is_refused:
                continue
            refused_above = total - refused_below
            if (
                refused_above >= LEAST_REFUSED
                and refused_above >= (1 - MIXED_SHARE) * (len(last) - below)
                and below > refused_below / MIXED_SHARE
                and sum(first.in_flight >= entry.in_flight for first in firsts) >= LEAST_MOMENTS
                and self._answered_since_refused(last, entry.in_flight) >= LEAST_ANSWERED
            ):
                return entry.in_flight
            refused_below += 1
        return None

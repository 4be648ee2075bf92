"""Decide how many requests may be in flight at one endpoint: a congestion window. Pure.

The window starts small. Where the operator allows more than the default, it grows with what was sent before
anything came back, up to three quarters of that: long answers tell nothing before the first of them is there.
Then it grows with every answer, as in slow start (RFC 5681), as long as more in flight bring more answers or
tokens per second (`throughput`), and no further than the deadline allows if all that is added had to queue.
Where more brought nothing, it stays near the number that the server works on at once, and tries again a
minute later.

Overload (503, 529 one after the other) shrinks it to what is in flight beside the refused ones, at most by
half in one round trip. After that it grows by one, then two, then four, each after a good number of answers.
An answer that did not come in time, where answers take long anyway, shrinks it below the number that were in
flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harvester.teacher.limiter.sends import Entry
from harvester.teacher.limiter.throughput import Throughput

FIRST_WINDOW = 16.0
# Before the first answer, with a ceiling above BLIND_CEILING: share of the ceiling that is reached, and how
# much the window grows with every request that was sent (`departures` decides how fast they are sent).
BLIND_CEILING = 64.0
BLIND_SHARE = 0.75
BLIND_GROWTH = 2.0
# The window grows only when this share of it was in use ...
GROWTH_SHARE = 0.8
# ... by SLOW_START with each answer, up to this many times the number at which an answer came: GROWTH where
# answers come within SOON_S, else PATIENT_GROWTH.
SLOW_START = 3.0
GROWTH = 4.0
PATIENT_GROWTH = 2.0
SOON_S = 2.0
# Largest factor of one round trip's cut by overload, and factor of a cut by a timeout.
CUT = 0.5
TIMEOUT_CUT = 0.75
# After a cut, at least ANSWERS_TO_GROW answers come before the window grows; after cuts to the same size up
# to MOST_PATIENCE times as many. After a first cut to a size by refusals, SOON_ANSWERS times the size are
# enough.
ANSWERS_TO_GROW = 150
SOON_ANSWERS = 2
# Below a cap, requests depart at most this many times as fast as answers come: SPREAD while the cap is in
# doubt, SURE_SPREAD after it was found again and again.
SPREAD = 2.0
SURE_SPREAD = 5.0
# An answer at a number in flight above the cap by more than this share (at least one) refutes the cap.
CAP_TOLERANCE = 0.05
MOST_PATIENCE = 4.0
# If everything that is added had to queue, answers would still come within this share of the deadline.
DEADLINE_SHARE = 0.75
# Where answers come within this share of the deadline, one that did not come in time says nothing.
UNHURRIED_SHARE = 0.4
# Where more in flight bring nothing: how many times what the server works on, and when how much more is
# tried.
QUEUE_SHARE = 2.0
PROBE_EVERY_S = 60.0
PROBE = 1.25
OPEN_FILES_NOTE = ", the most that the limit of open files allows"


class Window:
    """How many requests may be in flight: a congestion window (see the module's docstring).

    Attributes:
        ceiling: largest size, from the configuration.
        size: current size, 1 to `ceiling`; the whole part counts.
        spread_rate: departures per second below a cap on requests in flight, else infinity.
        works_on: how many requests the server works on at once, where more were tried in vain; else None.
    """

    def __init__(self, ceiling: int, deadline_s: float = math.inf) -> None:
        self.ceiling = float(ceiling)
        self.size = min(FIRST_WINDOW, self.ceiling)
        self.in_flight = 0
        self._ceiling_note, self._noted_ceiling = "", self.ceiling
        self.works_on: int | None = None
        self._deadline_s = deadline_s
        self._throughput = Throughput()
        # Before the first answer the window grows with what was sent, up to a share of the ceiling.
        self._is_blind = True
        self._departed = 0
        # The most in flight at which an answer came since the last cut, and answers until the next look.
        self._proven = 0
        self._deadline_bound = math.inf
        self._answers_to_look = 0
        # After an overload the window grows by `_step` whenever `_answers_to_grow` answers came.
        self._was_cut = False
        self._step = 1.0
        self._answers_to_grow = 0
        self._cut_at = -math.inf
        # The size to which refusals last brought the window, and how much longer it stays there each time.
        self._cap = 0.0
        self.spread_rate = math.inf
        self._patience = 1.0
        self._floor = 1.0
        self._probe_at = math.inf

    def enter(self) -> None:
        """Take a place for an admitted request."""
        self.in_flight += 1

    def leave(self) -> None:
        """Give a place back."""
        self.in_flight -= 1

    def explain_ceiling(self, note: str) -> None:
        """Say why the ceiling is lower than configured, as the end of a sentence."""
        self._ceiling_note, self._noted_ceiling = note, self.ceiling

    @property
    def ceiling_note(self) -> str:
        """Why the ceiling is lower than configured, as the end of a sentence; "" where it was set since."""
        return self._ceiling_note if self.ceiling == self._noted_ceiling else ""

    def set_ceiling(self, ceiling: int) -> None:
        """Change the ceiling."""
        self.ceiling = float(ceiling)
        self.size = min(self.size, self.ceiling)

    @property
    def is_full(self) -> bool:
        """Whether no further request may be sent now."""
        return self.in_flight >= int(min(self.size, self._deadline_bound))

    @property
    def _blind_limit(self) -> float:
        if self.ceiling <= BLIND_CEILING:
            return min(FIRST_WINDOW, self.ceiling)
        return max(FIRST_WINDOW, BLIND_SHARE * self.ceiling)

    def departed(self) -> None:
        """Note that a request was sent. Before anything came back, the window grows with what was sent."""
        self._departed += 1
        if self._is_blind:
            ahead = FIRST_WINDOW + BLIND_GROWTH * self._departed
            self.size = max(self.size, min(self._blind_limit, ahead))

    def stop_ramp(self) -> None:
        """End the growth of the start once something came back: from now on answers decide about growth."""
        self._is_blind = False

    def answered(self, entry: Entry, now: float, tokens: int) -> None:
        """Grow, stop growing, or shrink after an answer; its request still counts as in flight."""
        self._is_blind = False
        self._throughput.add(entry.in_flight, now - entry.at, tokens)
        if entry.at <= self._cut_at:
            return
        self._proven = max(self._proven, entry.in_flight)
        if entry.in_flight > self._cap + max(1.0, CAP_TOLERANCE * self._cap):
            self._cap = 0.0  # more than that were accepted
        self._set_deadline_bound()
        if self._cap:
            latency_s = self._throughput.latency_s(self.size) or now - entry.at
            spread = SPREAD if self._patience <= 1.0 else SURE_SPREAD
            self.spread_rate = spread * self.size / max(latency_s, 1e-3)
        else:
            self.spread_rate = math.inf
        self._answers_to_look -= 1
        if self._answers_to_look <= 0:
            self._look(now)
        if self.in_flight < GROWTH_SHARE * int(self.size):
            return
        if self._was_cut:
            self._grow_after_cut()
        elif self.works_on is None:
            self.size = max(self.size, min(self.size + SLOW_START, self._bound))

    def _look(self, now: float) -> None:
        """Compare what more in flight brought; once in a while try more although it brought nothing."""
        self._answers_to_look = max(4, int(self.size) // 8)
        before, self.works_on = self.works_on, self._throughput.works_on(min(self.size, self._proven))
        if self.works_on is None:
            return
        if before is None:
            self._probe_at = now + PROBE_EVERY_S
            self._after_cut()
        self.size = max(1.0, min(self.size, max(math.ceil(QUEUE_SHARE * self.works_on), 2.0)))
        if now >= self._probe_at:
            self._probe_at = now + PROBE_EVERY_S
            self.size = max(self.size, min(self.size * PROBE, self._bound))

    @property
    def _bound(self) -> float:
        """The most that may be in flight by what is known."""
        latency_s = self._throughput.latency_s(self._proven) or 0.0
        growth = GROWTH if latency_s < SOON_S else PATIENT_GROWTH
        return max(1.0, min(self.ceiling, growth * max(self._proven, 1), self._deadline_bound))

    def _set_deadline_bound(self) -> None:
        """Bound the number in flight: were all that is added to queue, latency would grow in proportion."""
        latency_s = self._throughput.latency_s(self._proven, deviations=1.0)
        if latency_s is not None and self._deadline_s < math.inf:
            self._deadline_bound = max(1.0, self._proven * DEADLINE_SHARE * self._deadline_s / latency_s)

    def _grow_after_cut(self) -> None:
        self._answers_to_grow -= 1
        if self._answers_to_grow > 0 or self.works_on is not None:
            return
        self._answers_to_grow = max(int(self.size), ANSWERS_TO_GROW)
        if self._patience < 1.0:
            self._answers_to_grow = SOON_ANSWERS * int(self.size)
        self.size = max(self.size, min(self.ceiling, self.size + self._step, max(self._bound, self.size + 1)))
        self._step *= 2

    def cut(self, entry: Entry, now: float, in_air: int) -> bool:
        """Shrink to what is in flight beside a request that met overload, at most by half per round trip.

        Args:
            in_air: requests that were sent and not answered, the refused one included.

        Returns:
            Whether the window shrank.
        """
        self._is_blind = False
        beside = in_air - 1.0
        if entry.at > self._cut_at:
            self._cut_at = now
            self._floor = max(1.0, math.floor(self.size * CUT))
        size = max(self._floor, beside)
        if size >= self.size:
            return False
        self.size = self._cap = size
        self._after_cut()
        return True

    def keep_below(self, in_flight: int) -> bool:
        """Stay below a number in flight at which refusals came again and again; grow slowly from there.

        Returns:
            Whether the window shrank.
        """
        size = max(1.0, in_flight - 1.0)
        if size >= self.size:
            return False
        is_known = size == self._cap
        self._patience = min(MOST_PATIENCE, 2 * self._patience) if is_known else 0.5
        self.size = self._cap = size
        self._after_cut()
        if not is_known:  # it may be the rate that is limited: try more soon
            self._answers_to_grow = SOON_ANSWERS * int(size)
        return True

    def timed_out(self, entry: Entry) -> None:
        """Remember that at this number in flight an answer did not come in time.

        It counts only where answers take a large part of the deadline anyway: one request that hangs says
        nothing about the others.
        """
        self._is_blind = False
        latency_s = self._throughput.latency_s(entry.in_flight)
        if latency_s is not None and latency_s < UNHURRIED_SHARE * self._deadline_s:
            return
        size = max(1.0, math.floor(entry.in_flight * TIMEOUT_CUT))
        if size < self.size:
            self.size = size
            self._proven = min(self._proven, int(size))
            self._after_cut()

    def _after_cut(self) -> None:
        self._was_cut = True
        self._step = 1.0
        self._answers_to_grow = int(self._patience * max(int(self.size), ANSWERS_TO_GROW))

    def restart(self) -> None:
        """Begin again with one request in flight, after the endpoint was down, and double from there."""
        self.size, self._was_cut, self._proven, self.works_on = 1.0, False, 0, None
        self._deadline_bound = math.inf
        self._throughput.forget()

    def saved(self) -> dict[str, Any]:
        """Return what was learned, as JSON values, for `resume` in a later process."""
        return {
            "works_on": self.works_on,
            "refused_from": self.refused_from,
            "proven": self._proven,
            "throughput": self._throughput.saved(),
        }

    def resume(self, saved: Mapping[str, Any], now: float) -> None:
        """Continue from what an earlier process learned: its numbers in flight, and no ramp beyond them."""
        self._throughput.resume(saved.get("throughput", []))
        if saved.get("refused_from"):
            self._cap = float(saved["refused_from"]) - 1
            self.size = max(1.0, min(self.size, self._cap))
            self._patience = 1.0
        if saved.get("works_on"):
            self.works_on = int(saved["works_on"])
            self.size = max(1.0, min(self.size, math.ceil(QUEUE_SHARE * self.works_on)))
            self._proven = int(min(self.size, saved.get("proven", self.size)))
            self._probe_at = now + PROBE_EVERY_S
            self._answers_to_look = max(4, int(self.size))
        if saved.get("refused_from") or saved.get("works_on"):
            self._is_blind = False
            self._after_cut()

    @property
    def refused_from(self) -> int | None:
        """Number in flight from which on requests were refused, or None."""
        return int(self._cap) + 1 if self._cap else None

    def limit_to_open_connections(self) -> None:
        """Lower the ceiling to what is open now without this request: no file descriptor is left."""
        self.ceiling = max(1.0, min(self.ceiling, self.in_flight - 1.0))
        self.size = min(self.size, self.ceiling)
        self.explain_ceiling(OPEN_FILES_NOTE)

    @property
    def note(self) -> str:
        """What was learned about the size, as the end of a sentence, or ""."""
        if self.works_on is not None:
            return f", the server works on {self.works_on:,} at once"
        return self.ceiling_note

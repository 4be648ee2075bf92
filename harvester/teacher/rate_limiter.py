"""How fast and how many at once: continuous token buckets with debt, and an AIMD window.

Pure: monotonic seconds in, a delay out; who waits, and how, is `teacher`'s matter. Law of a bucket:
what is admitted in any span of T seconds is at most `max(capacity, largest single charge) + rate * T`
(plus what was refunded in it). A request larger than the bucket goes when the bucket is full and is
charged in full, so the level may be negative: debt. Admission is in the order of asking: the head
of the line blocks, so small requests never starve a big one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harvester.config.config import LimitsSection
from harvester.teacher.rate_headers import DAY_S, parse_rate_headers
from harvester.teacher.rate_learning import LearnedRate

BURST_S = 0.25
"""Capacity of a bucket in seconds of its rate. Small, so that a restart can't double the rate."""
CUT = 0.5
GROWTH_SHARE = 0.8
FIRST_WINDOW = 16.0
LEARNED = "requests per second, learned from refusals"
LEAST_RATE = 1 / 60
OPEN_FILES = ", all that the limit of open files bears"
_EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Charge:
    """What one request takes out of the buckets (tokens estimated before, reported after)."""

    input_tokens: int
    output_tokens: int


class Bucket:
    """One limit. Starts empty but for one request's worth, so a cold start earns its burst.

    Args:
        name: for `why`, as in "tokens per minute".
        rate: units per second.
        now: monotonic seconds.
    """

    def __init__(self, name: str, rate: float, now: float) -> None:
        self.name = name
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S)
        self.level = 1.0
        self._at = now

    def save_up(self, capacity: float, rate: float) -> None:
        """Hold so much at once, all of it now: half a day's allowance, the other half over the day."""
        self.capacity, self.rate, self.level = max(1.0, capacity), rate, max(1.0, capacity)

    def change(self, rate: float, now: float) -> None:
        """Another rate from now on; what was saved or owed stays, within the new capacity."""
        self.refill(now)
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S)
        self.level = min(self.level, self.capacity)

    def refill(self, now: float) -> None:
        """Bring the level up to `now`; a step back counts as no time."""
        if now > self._at:
            self.level = min(self.capacity, self.level + (now - self._at) * self.rate)
            self._at = now

    def rest(self, now: float, until: float) -> None:
        """Nothing accrues before `until`, and at most one request's worth is left then."""
        self.refill(now)
        self.level = min(self.level, 1.0)
        self._at = max(self._at, until)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 when it may be taken now."""
        self.refill(now)
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > _EPSILON * self.capacity else 0.0

    def take(self, amount: float) -> None:
        """Charge; negative gives back, up to the capacity."""
        self.level = min(self.capacity, self.level - amount)


class Window:
    """How many requests may be in flight: additive increase, multiplicative decrease.

    One cut per round trip: a failure of a request sent before the last cut tells nothing new.
    Growth only when at least 80 % of the window was in use, doubling per round trip until the first cut.
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = float(ceiling)
        self.size = min(FIRST_WINDOW, self.ceiling)
        self.threshold = self.ceiling
        self.in_flight = 0
        self.cut_at = -math.inf
        self.held_by = ""

    def bound(self, ceiling: int) -> None:
        """Another ceiling from now on. A window that no failure had cut may grow to it at once."""
        if self.threshold >= self.ceiling:
            self.threshold = float(ceiling)
        self.ceiling = float(ceiling)
        self.size = min(self.size, self.ceiling)

    @property
    def is_full(self) -> bool:
        """Nobody may enter now."""
        return self.in_flight >= int(self.size)

    def grow(self, sent_at: float) -> None:
        """An answer came; its own slot still counts as used."""
        if sent_at <= self.cut_at or self.in_flight < GROWTH_SHARE * int(self.size):
            return
        step = 1.0 if self.size < self.threshold else 1.0 / self.size
        self.size = min(self.ceiling, self.size + step)

    def run_short(self) -> None:
        """This machine opens no further connection: what is open now has to do, less this one."""
        self.ceiling = max(1.0, min(self.ceiling, self.in_flight - 1.0))
        self.size = min(self.size, self.ceiling)
        self.held_by = OPEN_FILES

    def cut(self, sent_at: float, now: float) -> bool:
        """The teacher is overloaded; False when this round trip has had its cut already."""
        if sent_at <= self.cut_at:
            return False
        self.cut_at = now
        self.size = max(1.0, self.size * CUT)
        self.threshold = self.size
        return True


class Limiter:
    """All limits of one endpoint."""

    def __init__(self, limits: LimitsSection, now: float) -> None:
        self.window = Window(limits.max_concurrency)
        self.buckets: dict[str, Bucket] = {}
        self.pace = LearnedRate(now)
        self.typical_output: float | None = None
        self._configured: dict[str, float] = {}
        self.paused_until = -math.inf
        self.pause_reason = ""
        for name, limit, span_s in (
            ("requests per minute", limits.requests_per_minute, 60.0),
            ("tokens per minute", limits.tokens_per_minute, 60.0),
            ("input tokens per minute", limits.input_tokens_per_minute, 60.0),
            ("output tokens per minute", limits.output_tokens_per_minute, 60.0),
            ("requests per day", limits.requests_per_day, 86_400.0),
            ("tokens per day", limits.tokens_per_day, 86_400.0),
        ):
            if limit is not None:
                self._configured[name] = limit / span_s
                self.buckets[name] = Bucket(name, limit / span_s, now)
                if span_s == DAY_S:
                    self.buckets[name].save_up(limit / 2, limit / 2 / span_s)

    def wait_s(self, charge: Charge, now: float) -> float:
        """Seconds until this charge may pass: 0 now, infinity when only a release can tell."""
        if self.window.is_full:
            return math.inf
        wait = max(0.0, self.paused_until - now)
        self._keep_pace(now)
        for name, bucket in self.buckets.items():
            wait = max(wait, bucket.wait_s(amount(name, charge), now))
        return wait

    def enter(self, charge: Charge) -> None:
        """Take the charge and a place in the window; only after `wait_s` said 0."""
        self.window.in_flight += 1
        for name, bucket in self.buckets.items():
            bucket.take(amount(name, charge))

    def likely(self, charge: Charge) -> Charge:
        """What to reserve: the asked ceiling, or nearly all that answers used so far if that is less."""
        if self.typical_output is None or self.typical_output >= charge.output_tokens:
            return charge
        return Charge(charge.input_tokens, math.ceil(self.typical_output))

    def learn(self, headers: Mapping[str, str], now: float) -> None:
        """Take limits from a reply's headers; a configured limit stays the ceiling.

        A daily allowance that is used up pauses until its reset; otherwise it governs no rate.
        """
        for one in parse_rate_headers(headers):
            if one.span_s == DAY_S:
                if one.remaining is not None and one.remaining < 1 and one.reset_s:
                    self.pause(one.reset_s, now, one.name)
                continue
            rate = min(one.rate, self._configured.get(one.name, math.inf))
            bucket = self.buckets.get(one.name)
            if bucket is None:
                self.buckets[one.name] = Bucket(one.name, rate, now)
            elif bucket.rate != rate:
                bucket.change(rate, now)

    def refused(self, entered_at: float, now: float) -> bool:
        """A 429 came: slow down once per round trip; False when the refusal taught no rate."""
        learned = self.pace.refused(entered_at, now)
        if learned:
            self._keep_pace(now)
            self.buckets[LEARNED].level = min(0.0, self.buckets[LEARNED].level)
        return learned

    def _keep_pace(self, now: float) -> None:
        rate = self.pace.grow(now)
        if rate is None:
            return
        rate = max(rate, LEAST_RATE)
        bucket = self.buckets.get(LEARNED)
        if bucket is None:
            self.buckets[LEARNED] = Bucket(LEARNED, rate, now)
        else:
            bucket.change(rate, now)

    def retune(self, name: str, rate: float | None, now: float) -> None:
        """Another configured rate (units per second) for a bucket from now on; None takes the limit away."""
        if rate is None:
            self._configured.pop(name, None)
            self.buckets.pop(name, None)
            return
        self._configured[name] = rate
        if name in self.buckets:
            self.buckets[name].change(rate, now)
        else:
            self.buckets[name] = Bucket(name, rate, now)

    def leave(self) -> None:
        """Give the place in the window back; every `enter` has exactly one."""
        self.window.in_flight -= 1

    def settle(self, reserved: Charge, actual: Charge, now: float) -> None:
        """Correct the estimate by what the teacher counted."""
        if actual.output_tokens:
            # Stochastic quantile: rises by 19 parts for each answer above, falls by one for each below.
            q = actual.output_tokens if self.typical_output is None else self.typical_output
            step = max(1.0, 0.05 * q)
            self.typical_output = q + (0.95 * step if actual.output_tokens > q else -0.05 * step)
        for name, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(amount(name, actual) - amount(name, reserved))

    def refund(self, charge: Charge, now: float) -> None:
        """The request never left, or was refused before it counted: everything comes back."""
        for name, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(-amount(name, charge))

    def pause(self, seconds: float, now: float, reason: str) -> None:
        """The teacher named a time: nobody is admitted before it. The window is not touched."""
        until = now + seconds
        if until <= self.paused_until:
            return
        self.paused_until, self.pause_reason = until, reason
        # Nothing is saved up during a pause: those who waited leave one by one, not as a herd.
        for bucket in self.buckets.values():
            bucket.rest(now, until)

    def why(self, charge: Charge, now: float) -> str:
        """The limit that decides now, as in "tokens per minute, 41 s"; "" when none does."""
        waits = {name: bucket.wait_s(amount(name, charge), now) for name, bucket in self.buckets.items()}
        waits[self.pause_reason or "pause"] = max(0.0, self.paused_until - now)
        name = max(waits, key=lambda key: waits[key])
        if waits[name] > 0:
            return f"{name}, {waits[name]:.0f} s" if waits[name] >= 1 else name
        window = self.window
        return f"window of {int(window.size)} in flight{window.held_by}" if window.is_full else ""


def amount(name: str, charge: Charge) -> float:
    """What a charge takes out of the bucket of this name."""
    if name.startswith("requests"):
        return 1.0
    if name.startswith("input"):
        return charge.input_tokens
    if name.startswith("output"):
        return charge.output_tokens
    return charge.input_tokens + charge.output_tokens

"""Limit the rate and the number of requests in flight at one endpoint: token buckets and an AIMD window.

Everything here is pure: it takes monotonic seconds and returns seconds to wait. `queue.EndpointQueue` does
the waiting.

Rate: one token bucket per limit (RFC 3290, appendix A). A bucket gains `rate` units per second up to
`capacity`, and a request takes its estimated units before it is sent; `settle` corrects the estimate when the
teacher reports the real count. A request larger than the capacity is admitted when the bucket is full and is
charged in full, so the level goes below zero: the debt delays the requests after it. In any span of T seconds
a bucket therefore admits at most `max(capacity, largest single charge) + rate * T` units, plus refunds.

Concurrency: a congestion window with additive increase and multiplicative decrease (AIMD: Chiu and Jain,
"Analysis of the increase and decrease algorithms for congestion avoidance", 1989), as TCP has it (RFC 5681):
slow start doubles the window once per round trip until the first cut, then it grows by one per round trip.
Overload halves it, at most once per round trip (as with ECN, RFC 3168 section 6.1.2), and it grows only while
it is in use (RFC 7661).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from harvester.config.config import LimitsSection
from harvester.teacher.limits import DAY_S, LEARNED_REQUESTS, Charge, LimitKey, configured_limits
from harvester.teacher.rate_headers import parse_rate_headers
from harvester.teacher.rate_learning import LearnedRate

# Capacity of a bucket, in seconds of its rate. Small, so that a restart can't double the rate.
BURST_S = 0.25
# A daily limit may be spent this far at once; the rest is admitted evenly over the day.
DAILY_BURST_SHARE = 0.5
# Factor of a window cut.
CUT = 0.5
# The window grows only when this share of it was in use.
GROWTH_SHARE = 0.8
FIRST_WINDOW = 16.0
# Lowest learned rate, in requests per second.
LEAST_RATE = 1 / 60
OPEN_FILES_NOTE = ", the most that the limit of open files allows"
# Estimate of the output tokens of an answer: the quantile that is tracked, and the relative step.
_OUTPUT_QUANTILE = 0.95
_OUTPUT_STEP = 0.05
_EPSILON = 1e-9


class Bucket:
    """A token bucket with debt. It starts with one unit, so a new process earns its burst first.

    Args:
        rate: units per second.
        now: monotonic seconds.
    """

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S)
        self.level = 1.0
        self._refilled_at = now

    @classmethod
    def daily(cls, limit: float, now: float) -> Bucket:
        """A bucket for `limit` units per day: half of them at once, the other half evenly over the day."""
        bucket = cls((1 - DAILY_BURST_SHARE) * limit / DAY_S, now)
        bucket.capacity = bucket.level = max(1.0, DAILY_BURST_SHARE * limit)
        return bucket

    def set_rate(self, rate: float, now: float) -> None:
        """Change the rate from `now` on. Savings and debt stay, within the new capacity."""
        self.refill(now)
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S)
        self.level = min(self.level, self.capacity)

    def refill(self, now: float) -> None:
        """Bring the level up to `now`. A clock that went back adds nothing."""
        if now > self._refilled_at:
            self.level = min(self.capacity, self.level + (now - self._refilled_at) * self.rate)
            self._refilled_at = now

    def freeze(self, now: float, until: float) -> None:
        """Add nothing before `until`, and keep at most one unit, so that a pause ends without a burst."""
        self.refill(now)
        self.level = min(self.level, 1.0)
        self._refilled_at = max(self._refilled_at, until)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 when it may be taken now."""
        self.refill(now)
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > _EPSILON * self.capacity else 0.0

    def take(self, amount: float) -> None:
        """Take `amount` units, into debt if need be. A negative amount gives back, up to the capacity."""
        self.level = min(self.capacity, self.level - amount)


class Window:
    """How many requests may be in flight: a congestion window (see the module's docstring).

    Attributes:
        ceiling: largest size, from the configuration.
        size: current size, 1 to `ceiling`; the whole part counts.
        threshold: below it the window doubles per round trip, above it grows by one.
        ceiling_note: why the ceiling is lower than configured, as the end of a sentence, or "".
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = float(ceiling)
        self.size = min(FIRST_WINDOW, self.ceiling)
        self.threshold = self.ceiling
        self.in_flight = 0
        self.ceiling_note = ""
        self._cut_at = -math.inf

    def set_ceiling(self, ceiling: int) -> None:
        """Change the ceiling. A window that was never cut stays in its doubling phase."""
        if self.threshold >= self.ceiling:
            self.threshold = float(ceiling)
        self.ceiling = float(ceiling)
        self.size = min(self.size, self.ceiling)

    @property
    def is_full(self) -> bool:
        """Whether no further request may be sent now."""
        return self.in_flight >= int(self.size)

    def grow(self, sent_at: float) -> None:
        """Grow after an answer to a request sent at `sent_at`; that request still counts as in flight."""
        if sent_at <= self._cut_at or self.in_flight < GROWTH_SHARE * int(self.size):
            return
        step = 1.0 if self.size < self.threshold else 1.0 / self.size
        self.size = min(self.ceiling, self.size + step)

    def cut(self, sent_at: float, now: float) -> bool:
        """Halve the window: a request sent at `sent_at` met overload.

        Returns:
            False when the request was sent before the last cut: its round trip has been punished already.
        """
        if sent_at <= self._cut_at:
            return False
        self._cut_at = now
        self.size = max(1.0, self.size * CUT)
        self.threshold = self.size
        return True

    def restart(self) -> None:
        """Begin again with one request in flight, after the endpoint was down, and double from there."""
        self.size, self.threshold = 1.0, self.ceiling

    def limit_to_open_connections(self) -> None:
        """Lower the ceiling to what is open now without this request: no file descriptor is left."""
        self.ceiling = max(1.0, min(self.ceiling, self.in_flight - 1.0))
        self.size = min(self.size, self.ceiling)
        self.ceiling_note = OPEN_FILES_NOTE


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing is admitted before `until` (monotonic seconds).

    `is_asked` says that the teacher asked for it; otherwise our circuit breaker did.
    """

    until: float = -math.inf
    reason: str = ""
    is_asked: bool = True


class Limiter:
    """All limits of one endpoint: a bucket per limit, the window, and pauses.

    Attributes:
        buckets: by limit; rates are in units per second.
        learned_rate: requests per second where the teacher states no limit.
        output_estimate: tokens that 95 % of the answers stay below, None before the first answer.
    """

    def __init__(self, limits: LimitsSection, now: float) -> None:
        self.window = Window(limits.max_concurrency)
        self.buckets: dict[LimitKey, Bucket] = {}
        self.learned_rate = LearnedRate(now)
        self.output_estimate: float | None = None
        self.pause_now = Pause()
        # Units per second; a limit that a header names never raises these.
        self._configured: dict[LimitKey, float] = {}
        for key, limit in configured_limits(limits).items():
            self._configured[key] = limit / key.period_s
            is_daily = key.period_s == DAY_S
            self.buckets[key] = Bucket.daily(limit, now) if is_daily else Bucket(limit / key.period_s, now)

    @property
    def paused_until(self) -> float:
        """Monotonic seconds before which nothing is admitted; minus infinity when never paused."""
        return self.pause_now.until

    def wait_s(self, charge: Charge, now: float) -> float:
        """Seconds until this charge may be admitted: 0 for now, infinity while the window is full."""
        if self.window.is_full:
            return math.inf
        wait = max(0.0, self.paused_until - now)
        self._apply_learned_rate(now)
        for key, bucket in self.buckets.items():
            wait = max(wait, bucket.wait_s(key.quantity.amount(charge), now))
        return wait

    def enter(self, charge: Charge) -> None:
        """Take the charge and a place in the window. Call it only after `wait_s` returned 0."""
        self.window.in_flight += 1
        for key, bucket in self.buckets.items():
            bucket.take(key.quantity.amount(charge))

    def leave(self) -> None:
        """Give the place in the window back; every `enter` needs exactly one `leave`."""
        self.window.in_flight -= 1

    def expected_charge(self, charge: Charge) -> Charge:
        """What to reserve: the requested maximum, or what 95 % of the answers so far used if that is less."""
        if self.output_estimate is None or self.output_estimate >= charge.output_tokens:
            return charge
        return Charge(charge.input_tokens, math.ceil(self.output_estimate))

    def settle(self, reserved: Charge, actual: Charge, now: float) -> None:
        """Replace the estimate of an answered request by what the teacher counted."""
        if actual.output_tokens:
            self._estimate_output(actual.output_tokens)
        for key, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(key.quantity.amount(actual) - key.quantity.amount(reserved))

    def _estimate_output(self, output_tokens: int) -> None:
        """Move the estimate towards the 0.95 quantile, by stochastic approximation (Robbins and Monro, 1951).

        It rises by 0.95 steps for each answer above it and falls by 0.05 steps for each below.
        """
        if self.output_estimate is None:
            self.output_estimate = float(output_tokens)
        step = max(1.0, _OUTPUT_STEP * self.output_estimate)
        is_above = output_tokens > self.output_estimate
        self.output_estimate += step * (_OUTPUT_QUANTILE if is_above else _OUTPUT_QUANTILE - 1)

    def refund(self, charge: Charge, now: float) -> None:
        """Give a whole charge back: the request was never sent, or was refused before it counted."""
        for key, bucket in self.buckets.items():
            bucket.refill(now)
            bucket.take(-key.quantity.amount(charge))

    def learn_from_headers(self, headers: Mapping[str, str], now: float) -> None:
        """Take limits from a reply's headers. A configured limit stays the upper bound.

        A daily limit in a header sets no rate; when it is used up, it pauses until its reset.
        """
        for header in parse_rate_headers(headers):
            if header.key.period_s == DAY_S:
                if header.remaining is not None and header.remaining < 1 and header.reset_s:
                    self.pause(header.reset_s, now, header.key.label)
                continue
            rate = min(header.rate, self._configured.get(header.key, math.inf))
            bucket = self.buckets.get(header.key)
            if bucket is None or bucket.rate != rate:
                self._set_bucket(header.key, rate, now)

    def set_rate(self, key: LimitKey, rate: float | None, now: float) -> None:
        """Change a configured limit from now on, in units per second; None removes it."""
        if rate is None:
            self._configured.pop(key, None)
            self.buckets.pop(key, None)
            return
        self._configured[key] = rate
        self._set_bucket(key, rate, now)

    def _set_bucket(self, key: LimitKey, rate: float, now: float) -> None:
        bucket = self.buckets.get(key)
        if bucket is None:
            self.buckets[key] = Bucket(rate, now)
        else:
            bucket.set_rate(rate, now)

    def learn_from_refusal(self, entered_at: float, now: float) -> bool:
        """Lower the learned rate after a 429 to a request admitted at `entered_at`.

        Returns:
            False when it taught nothing: its round trip was counted already, or too few answers are known.
        """
        learned = self.learned_rate.refused(entered_at, now)
        if learned:
            self._apply_learned_rate(now)
            bucket = self.buckets[LEARNED_REQUESTS]
            bucket.level = min(0.0, bucket.level)
        return learned

    def _apply_learned_rate(self, now: float) -> None:
        rate = self.learned_rate.grow(now)
        if rate is not None:
            self._set_bucket(LEARNED_REQUESTS, max(rate, LEAST_RATE), now)

    def pause(self, seconds: float, now: float, reason: str, *, is_asked: bool = True) -> None:
        """Admit nothing for `seconds`; a shorter pause than the current one changes nothing.

        The window keeps its size. The buckets save nothing up, so what waited leaves one by one.

        Args:
            reason: for `waiting_reason`.
            is_asked: whether the teacher asked for it; see `Pause`.
        """
        until = now + seconds
        if until <= self.paused_until:
            return
        self.pause_now = Pause(until, reason, is_asked)
        for bucket in self.buckets.values():
            bucket.freeze(now, until)

    def waiting_reason(self, charge: Charge, now: float) -> str:
        """The limit that delays this charge now, as in "tokens per minute, 41 s"; "" when none does."""
        waits = {
            key.label: bucket.wait_s(key.quantity.amount(charge), now) for key, bucket in self.buckets.items()
        }
        waits[self.pause_now.reason or "pause"] = max(0.0, self.paused_until - now)
        label = max(waits, key=lambda label: waits[label])
        if waits[label] > 0:
            return f"{label}, {waits[label]:.0f} s" if waits[label] >= 1 else label
        window = self.window
        return f"window of {int(window.size)} in flight{window.ceiling_note}" if window.is_full else ""

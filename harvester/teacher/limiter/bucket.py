"""Keep one limit as a token bucket with debt (RFC 3290, appendix A). Pure: times are monotonic seconds.

A bucket gains `rate` units per second up to `capacity`. A request takes its estimated units before it is
sent. One that is larger than the capacity is admitted when the bucket is full and is charged in full, so
the level goes below zero: the debt delays the requests after it. In any span of T seconds a bucket
therefore admits at most `max(capacity, largest single charge) + rate * T` units, plus what was given back.
"""

from __future__ import annotations

from harvester.teacher.limiter.limits import DAY_S

# Capacity of a bucket, in seconds of its rate. Small, so that a restart can't double the rate.
BURST_S = 0.25
# A daily limit may be spent this far at once; the rest is admitted evenly over the day.
DAILY_BURST_SHARE = 0.5
_EPSILON = 1e-9


class Bucket:
    """A token bucket with debt. It starts with one unit, so a new process earns its burst first.

    Args:
        rate: units per second.
        now: monotonic seconds.
        full_at: units that may be saved up and are there from the start; None for BURST_S of the rate.

    Attributes:
        taken: units taken so far, less those given back.
    """

    def __init__(self, rate: float, now: float, *, full_at: float | None = None) -> None:
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S if full_at is None else full_at)
        self.level = 1.0 if full_at is None else self.capacity
        self.taken = 0.0
        self._refilled_at = now

    @classmethod
    def daily(cls, limit: float, now: float) -> Bucket:
        """Return a bucket for `limit` units per day: half of them at once, the others evenly over the day."""
        return cls((1 - DAILY_BURST_SHARE) * limit / DAY_S, now, full_at=DAILY_BURST_SHARE * limit)

    def set_rate(self, rate: float, now: float) -> None:
        """Change the rate. Savings and debt stay, within the new capacity."""
        self.refill(now)
        self.rate = rate
        self.capacity = max(1.0, rate * BURST_S)
        self.level = min(self.level, self.capacity)

    def scale(self, ratio: float, now: float) -> None:
        """Multiply rate and capacity. Of savings the part beyond a smaller share is lost; debt stays."""
        self.refill(now)
        self.rate *= ratio
        self.capacity = max(1.0, self.capacity * ratio)
        if ratio < 1 and self.level > 0:
            self.level *= ratio
        self.level = min(self.level, self.capacity)

    def resize(self, ratio: float, level: float) -> None:
        """Multiply rate and capacity, and set the level; both were brought up to now before."""
        self.rate *= ratio
        self.capacity = max(1.0, self.capacity * ratio)
        self.level = min(level, self.capacity)

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
        """Return seconds until `amount` may be taken; 0 when it may be taken now."""
        self.refill(now)
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > _EPSILON * self.capacity else 0.0

    def lower_to(self, level: float) -> None:
        """Lower the level to this one, if it is higher."""
        self.level = min(self.level, level)

    def take(self, amount: float) -> None:
        """Take `amount` units, into debt if need be. A negative amount gives back, up to the capacity."""
        self.taken += amount
        self.level = min(self.capacity, self.level - amount)

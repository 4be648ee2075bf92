"""The mock teacher's true limits: continuous token buckets, no minute windows.

A bucket refills at `limit / 60` per second and holds at most `burst_s` seconds of that (at least one
request). What is larger than a full bucket passes when the bucket is full and leaves a debt, so over
any span of T seconds at most `max(capacity, largest single charge) + T * limit / 60` passes.
A refused request takes nothing. `remaining` is what may be taken now, `reset` the time to a full bucket.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harvester.mock_teacher.wire import Headers, Refusal, error_body


class MockBucket:
    """One token bucket. Time comes in as monotonic seconds; a step back counts as no time.

    Args:
        per_minute: refill in units per minute, above 0.
        burst_s: capacity in seconds of refill.
        now: the time at which the bucket is full.
    """

    def __init__(self, per_minute: float, burst_s: float, now: float) -> None:
        self._at = now
        self.per_minute = per_minute
        self.rate = per_minute / 60
        self.capacity = max(1.0, self.rate * burst_s)
        self.level = self.capacity

    def change(self, per_minute: float, burst_s: float, now: float) -> None:
        """Set another limit from now on; what was saved up or owed stays, within the new capacity."""
        self.refill(now)
        self.per_minute = per_minute
        self.rate = per_minute / 60
        self.capacity = max(1.0, self.rate * burst_s)
        self.level = min(self.level, self.capacity)

    def refill(self, now: float) -> None:
        """Bring the level up to the given time."""
        if now > self._at:
            self.level = min(self.capacity, self.level + (now - self._at) * self.rate)
            self._at = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be taken; 0 if it may be taken now."""
        self.refill(now)
        # The tolerance absorbs the rounding of level + time * rate: a caller who waits exactly
        # as long as told must get through.
        missing = min(amount, self.capacity) - self.level
        return missing / self.rate if missing > 1e-9 * self.capacity else 0.0

    def take(self, amount: float) -> None:
        """Take without asking; call `wait_s` first."""
        self.level -= amount

    def reset_s(self) -> float:
        """Seconds until the bucket is full."""
        return (self.capacity - self.level) / self.rate


def duration(seconds: float) -> str:
    """Write seconds as OpenAI's headers do: `12ms`, `1.2s`, `6m0s`, `1h0m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    tail = f"{rest:.3f}".rstrip("0").rstrip(".") + "s"
    if minutes < 1:
        return tail
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}h{minutes}m{tail}" if hours else f"{minutes}m{tail}"


@dataclass(slots=True)
class LimitValues:
    """The numbers in force; `POST /mock/limits` changes them."""

    rpm: float | None = None
    tpm: float | None = None
    burst_s: float = 1.0
    hide: bool = False
    max_concurrency: int | None = None
    concurrency_status: int = 503


class MockLimits:
    """Requests and tokens per minute, and how many requests may be in the works."""

    def __init__(self, values: LimitValues, model: str, now: float) -> None:
        self._model = model
        self._buckets: dict[str, MockBucket] = {}
        self.values = values
        self.change(values, now)

    def change(self, values: LimitValues, now: float) -> None:
        """Put other numbers in force from now on."""
        self.values = values
        for name, per_minute in (("requests", values.rpm), ("tokens", values.tpm)):
            bucket = self._buckets.get(name)
            if per_minute is None:
                self._buckets.pop(name, None)
            elif bucket is None:
                self._buckets[name] = MockBucket(per_minute, values.burst_s, now)
            else:
                bucket.change(per_minute, values.burst_s, now)

    def check_concurrency(self, in_flight: int) -> None:
        """Refuse if `in_flight`, this request included, is over the ceiling."""
        ceiling = self.values.max_concurrency
        if ceiling is None or in_flight <= ceiling:
            return
        if self.values.concurrency_status == 429:
            body = error_body("Too many concurrent requests.", "requests", "rate_limit_exceeded")
        else:
            body = error_body("The server is currently overloaded.", "server_error", "server_overloaded")
        raise Refusal(self.values.concurrency_status, body)

    def admit(self, tokens: int, now: float) -> None:
        """Take one request and `tokens` tokens, or raise `Refusal` (429) and take nothing."""
        if not self._buckets:
            return
        amounts = {"requests": 1, "tokens": tokens}
        waits = {name: bucket.wait_s(amounts[name], now) for name, bucket in self._buckets.items()}
        name = max(waits, key=lambda key: waits[key])
        if "tokens" in self._buckets and tokens > self._buckets["tokens"].per_minute:
            raise self._refusal("tokens", tokens, None)
        if waits[name] > 0:
            raise self._refusal(name, amounts[name], waits[name])
        for key, bucket in self._buckets.items():
            bucket.take(amounts[key])

    def headers(self) -> Headers:
        """The `x-ratelimit-*` headers of this moment, none if hidden."""
        if self.values.hide:
            return []
        found: Headers = []
        for name, bucket in self._buckets.items():
            key = name.encode()
            found.append((b"x-ratelimit-limit-" + key, b"%d" % bucket.per_minute))
            found.append((b"x-ratelimit-remaining-" + key, b"%d" % max(0, math.floor(bucket.level))))
            found.append((b"x-ratelimit-reset-" + key, duration(bucket.reset_s()).encode()))
        return found

    def _refusal(self, name: str, requested: int, wait_s: float | None) -> Refusal:
        bucket = self._buckets[name]
        short = "RPM" if name == "requests" else "TPM"
        where = f"for {self._model} in organization org-mock on {name} per min ({short})"
        if self.values.hide:
            return Refusal(429, error_body("Rate limit reached.", name, "rate_limit_exceeded"))
        sums = f"Limit {bucket.per_minute:.0f}, Requested {requested}."
        if wait_s is None:
            text = f"Request too large {where}: {sums}"
            return Refusal(429, error_body(text, name, "rate_limit_exceeded"), self.headers())
        text = f"Rate limit reached {where}: {sums} Please try again in {duration(wait_s)}."
        told = [
            (b"retry-after", b"%d" % math.ceil(wait_s)),
            (b"retry-after-ms", b"%d" % math.ceil(wait_s * 1000)),
        ]
        return Refusal(429, error_body(text, name, "rate_limit_exceeded"), [*told, *self.headers()])

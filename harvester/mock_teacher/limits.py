"""Enforce the mock teacher's request and token limits, and write its rate-limit headers.

The check is the Generic Cell Rate Algorithm in its virtual-scheduling form (ITU-T I.371, annex A). It keeps
one number, the theoretical arrival time: the moment at which everything admitted so far is paid off at the
limit's rate. It is computed differently from the harvester's own token bucket on purpose, so that a mistake
in one of the two does not hide in the other.

Over any span of T seconds at most `max(burst, largest single amount) + T * limit / 60` units are admitted.
A burst is `burst_s` seconds' worth of the limit, at least one unit. A larger amount is admitted when nothing
is owed, and what follows waits the longer. A refused request takes nothing. In the headers, `remaining` is
the amount that would be admitted now, `reset` the time until a whole burst would be.

With `window_s` requests and tokens are counted in fixed windows of that many seconds instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from harvester.mock_teacher.wire import Headers, Refusal, error_body


class ArrivalSchedule:
    """One limit as a GCRA. Times are monotonic seconds; a clock that steps back counts as standing still.

    Args:
        per_minute: the limit in units per minute, above 0.
        burst_s: how many seconds' worth of the limit are admitted at once.
        now: the current time; a whole burst is admitted from here on.
    """

    def __init__(self, per_minute: float, burst_s: float, now: float) -> None:
        self._now = now
        self._arrival = now  # the theoretical arrival time
        self._set(per_minute, burst_s)

    def _set(self, per_minute: float, burst_s: float) -> None:
        self.per_minute = per_minute
        self.interval_s = 60 / per_minute  # seconds that one unit takes
        self.burst = max(1.0, burst_s / self.interval_s)

    def change(self, per_minute: float, burst_s: float, now: float) -> None:
        """Replace the limit. What may be admitted at once stays as it is, or shrinks to the new burst."""
        remaining = self.remaining(now)
        self._set(per_minute, burst_s)
        self._arrival = self._now + max(0.0, self.burst - remaining) * self.interval_s

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is admitted, 0 if it is admitted now."""
        self._advance(now)
        earliest = self._arrival - (self.burst - min(amount, self.burst)) * self.interval_s
        wait_s = earliest - self._now
        # Rounding: a caller that waits exactly as long as it was told must be admitted.
        rounding_s = 1e-9 * (self.burst * self.interval_s + abs(self._now))
        return wait_s if wait_s > rounding_s else 0.0

    def take(self, amount: float, now: float) -> None:
        """Admit `amount` without a check; call `wait_s` first."""
        self._advance(now)
        self._arrival = max(self._arrival, self._now) + amount * self.interval_s

    def remaining(self, now: float) -> float:
        """Return how many units would be admitted at once; negative after an amount larger than a burst."""
        return self.burst - self.reset_s(now) / self.interval_s

    def reset_s(self, now: float) -> float:
        """Return the seconds until a whole burst would be admitted."""
        self._advance(now)
        return max(0.0, self._arrival - self._now)

    def _advance(self, now: float) -> None:
        self._now = max(self._now, now)


class WindowCount:
    """One limit that is counted in fixed windows of time. Times are monotonic seconds.

    Args:
        per_minute: the limit in units per minute, above 0; a window admits its share, at least one unit.
        window_s: length of a window.
        now: the first window begins here.
    """

    def __init__(self, per_minute: float, window_s: float, now: float) -> None:
        self._begun_at = self._now = now
        self._used = 0.0
        self._set(per_minute, window_s)

    def _set(self, per_minute: float, window_s: float) -> None:
        self.per_minute = per_minute
        self.window_s = window_s
        self.burst = max(1.0, per_minute * window_s / 60)

    def change(self, per_minute: float, window_s: float, now: float) -> None:
        """Replace the limit; what was used of this window stays used."""
        self._advance(now)
        self._set(per_minute, window_s)

    def wait_s(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is admitted, 0 if it is admitted now."""
        self._advance(now)
        fits = self._used == 0 or self._used + amount <= self.burst
        return 0.0 if fits else self.reset_s(now)

    def take(self, amount: float, now: float) -> None:
        """Admit `amount` without a check; call `wait_s` first."""
        self._advance(now)
        self._used += amount

    def remaining(self, now: float) -> float:
        """Return how many units this window still admits."""
        self._advance(now)
        return self.burst - self._used

    def reset_s(self, now: float) -> float:
        """Return the seconds until the next window."""
        self._advance(now)
        return self._begun_at + self.window_s - self._now

    def _advance(self, now: float) -> None:
        self._now = max(self._now, now)
        windows = (self._now - self._begun_at) // self.window_s
        if windows > 0:
            self._begun_at += windows * self.window_s
            self._used = 0.0


def duration(seconds: float) -> str:
    """Format seconds as in OpenAI's headers: `12ms`, `1.2s`, `6m0s`, `1h0m0s`."""
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
    """The limits in force; `POST /mock/limits` changes them. None means no limit."""

    rpm: float | None = None
    tpm: float | None = None
    burst_s: float = 1.0
    window_s: float | None = None
    hide: bool = False
    max_concurrency: int | None = None
    concurrency_status: int = 503


class MockLimits:
    """The limits on requests and tokens per minute, and on requests in flight."""

    def __init__(self, values: LimitValues, model: str, now: float) -> None:
        self._model = model
        self._schedules: dict[str, ArrivalSchedule | WindowCount] = {}
        self.values = values
        self.change(values, now)

    def change(self, values: LimitValues, now: float) -> None:
        """Put other numbers in force from now on."""
        self.values = values
        for name, per_minute in (("requests", values.rpm), ("tokens", values.tpm)):
            schedule = self._schedules.get(name)
            if per_minute is None:
                self._schedules.pop(name, None)
            elif values.window_s is not None:
                if isinstance(schedule, WindowCount):
                    schedule.change(per_minute, values.window_s, now)
                else:
                    self._schedules[name] = WindowCount(per_minute, values.window_s, now)
            elif isinstance(schedule, ArrivalSchedule):
                schedule.change(per_minute, values.burst_s, now)
            else:
                self._schedules[name] = ArrivalSchedule(per_minute, values.burst_s, now)

    def check_concurrency(self, in_flight: int) -> None:
        """Raise `Refusal` if `in_flight`, which counts this request too, is above the limit."""
        limit = self.values.max_concurrency
        if limit is None or in_flight <= limit:
            return
        if self.values.concurrency_status == 429:
            body = error_body("Too many concurrent requests.", "requests", "rate_limit_exceeded")
        else:
            body = error_body("The server is currently overloaded.", "server_error", "server_overloaded")
        raise Refusal(self.values.concurrency_status, body)

    def admit(self, tokens: int, now: float) -> None:
        """Take one request and `tokens` tokens, or raise `Refusal` (429) and take nothing."""
        if not self._schedules:
            return
        amounts = {"requests": 1, "tokens": tokens}
        waits = {name: schedule.wait_s(amounts[name], now) for name, schedule in self._schedules.items()}
        slowest = max(waits, key=lambda name: waits[name])
        if "tokens" in self._schedules and tokens > self._schedules["tokens"].per_minute:
            raise self._refusal("tokens", tokens, None, now)
        if waits[slowest] > 0:
            raise self._refusal(slowest, amounts[slowest], waits[slowest], now)
        for name, schedule in self._schedules.items():
            schedule.take(amounts[name], now)

    def headers(self, now: float) -> Headers:
        """Return the current `x-ratelimit-*` headers; an empty list if the limits are hidden.

        With windows they are those of Together and Kong for requests: limit and rest of the window, and the
        whole seconds to its end, in names that don't say how long it is.
        """
        if self.values.hide:
            return []
        if self.values.window_s is not None:
            return self._window_headers(now)
        headers: Headers = []
        for name, schedule in self._schedules.items():
            suffix = name.encode()
            remaining = max(0, math.floor(schedule.remaining(now)))
            headers.append((b"x-ratelimit-limit-" + suffix, b"%d" % schedule.per_minute))
            headers.append((b"x-ratelimit-remaining-" + suffix, b"%d" % remaining))
            headers.append((b"x-ratelimit-reset-" + suffix, duration(schedule.reset_s(now)).encode()))
        return headers

    def _window_headers(self, now: float) -> Headers:
        schedule = self._schedules.get("requests")
        if schedule is None:
            return []
        return [
            (b"x-ratelimit-limit", b"%d" % schedule.burst),
            (b"x-ratelimit-remaining", b"%d" % max(0, math.floor(schedule.remaining(now)))),
            (b"x-ratelimit-reset", b"%d" % math.ceil(schedule.reset_s(now))),
        ]

    def _refusal(self, name: str, requested: int, wait_s: float | None, now: float) -> Refusal:
        short = "RPM" if name == "requests" else "TPM"
        where = f"for {self._model} in organization org-mock on {name} per min ({short})"
        if self.values.hide or self.values.window_s is not None:
            body = error_body("Rate limit reached.", name, "rate_limit_exceeded")
            return Refusal(429, body, self.headers(now))
        numbers = f"Limit {self._schedules[name].per_minute:.0f}, Requested {requested}."
        if wait_s is None:
            text = f"Request too large {where}: {numbers}"
            return Refusal(429, error_body(text, name, "rate_limit_exceeded"), self.headers(now))
        text = f"Rate limit reached {where}: {numbers} Please try again in {duration(wait_s)}."
        retry = [
            (b"retry-after", b"%d" % math.ceil(wait_s)),
            (b"retry-after-ms", b"%d" % math.ceil(wait_s * 1000)),
        ]
        return Refusal(429, error_body(text, name, "rate_limit_exceeded"), [*retry, *self.headers(now)])

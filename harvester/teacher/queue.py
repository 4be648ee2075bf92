"""The door of one endpoint: who waits, in which order, and what each reply teaches the limiter.

The laws are `limiter`'s; here is only the waiting. One line, first come first served: its head waits,
all others queue behind it, so a big request is never overtaken for ever.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

from harvester.errors import (
    AttemptTimeout,
    ConnectionBroken,
    EndpointDown,
    NotSent,
    Parked,
    RateLimited,
    TeacherError,
    TeacherUnavailable,
)
from harvester.system import open_files
from harvester.system.clock import Clock
from harvester.teacher.circuit_breaker import CircuitBreaker
from harvester.teacher.rate_limiter import Charge, Limiter

UNNAMED_PAUSE_S = 0.5
LONGEST_UNNAMED_PAUSE_S = 60.0
LOOK = "the teacher fails; next look"
_ASKED = "the teacher's Retry-After"
_OVERLOAD = frozenset({429, 503, 529})


class EndpointQueue:
    """Lets requests through to one endpoint under its limiter and its breaker.

    Args:
        patience_s: longest single wait, and longest time without any answer, before the pass parks.
        elsewhere: whether another endpoint is up.
    """

    def __init__(
        self,
        endpoint: str,
        limiter: Limiter,
        clock: Clock,
        *,
        patience_s: float = math.inf,
        elsewhere: Callable[[], bool] = lambda: False,
    ) -> None:
        self.endpoint = endpoint
        self.limiter = limiter
        self.clock = clock
        self.breaker = CircuitBreaker()
        self._patience_s = patience_s
        self._elsewhere = elsewhere
        self.draining = asyncio.Event()
        self.moved = asyncio.Event()
        self.held_for = ""
        self._line = asyncio.Lock()
        self._in_line = 0
        self._head = Charge(0, 0)
        self._refused_in_a_row = 0
        self._taught_at = -math.inf
        self._last = ""

    def drain(self) -> None:
        """Admit nobody any more; everyone who waits gets NotSent."""
        self.draining.set()
        self.moved.set()

    def hold(self, why: str) -> None:
        """Admit nobody, for this reason, until called with "": then one by one, nothing was saved up."""
        if self.held_for and not why:
            now = self.clock.now()
            for bucket in self.limiter.buckets.values():
                bucket.rest(now, now)
            self.breaker.forgive(now)
        self.held_for = why
        self.moved.set()

    def why(self) -> str:
        """What holds the next request back, "" when nothing does."""
        if self.held_for:
            return self.held_for
        return self.limiter.why(self._head, self.clock.now()) if self._in_line else ""

    @property
    def is_out(self) -> bool:
        """Ejected, or asked to wait beyond our patience."""
        return self.breaker.is_open or (self.limiter.paused_until - self.clock.now() > self._patience_s)

    def load(self) -> tuple[int, float]:
        """The least is chosen: a look at one that fell out, then the emptiest line, then those out."""
        window = self.limiter.window
        if self.is_out:
            may_look = not self._in_line and not window.in_flight
            return (0 if may_look and self.clock.now() >= self.limiter.paused_until else 2), 0.0
        return 1, (self._in_line + window.in_flight) / window.size

    async def enter(self, charge: Charge) -> float:
        """Wait for a turn; returns the time of entry. Every entry needs one `leave`.

        Raises:
            NotSent: the pass drains.
            Parked: the wait is longer than our patience.
            EndpointDown: the endpoint fell out meanwhile, and another one is up.
        """
        if self.draining.is_set():
            raise NotSent
        if self._in_line or self._wait_s(charge) > 0:
            await self._stand_in_line(charge)
        self.limiter.enter(charge)
        return self.clock.now()

    async def _stand_in_line(self, charge: Charge) -> None:
        self._in_line += 1
        try:
            async with self._line:
                self._head = charge
                while (wait_s := self._wait_s(charge)) > 0:
                    if self.draining.is_set():  # also who came to the head of the line after the drain
                        raise NotSent
                    self._look_around(wait_s)
                    self.moved.clear()
                    await self.clock.wait(self.moved, wait_s)
                    if self.draining.is_set():
                        raise NotSent
        finally:
            self._in_line -= 1

    def _wait_s(self, charge: Charge) -> float:
        return math.inf if self.held_for else self.limiter.wait_s(charge, self.clock.now())

    def _look_around(self, wait_s: float) -> None:
        """Raise when waiting here is of no use."""
        if self.held_for:
            return
        if self.is_out and self._elsewhere():
            raise EndpointDown
        now = self.clock.now()
        if self.breaker.is_open:
            look_s = max(0.0, self.limiter.paused_until - now)
            if self.breaker.down_s(now) + look_s > self._patience_s:
                raise Parked(look_s, f"no answer from {self.endpoint}; the last attempt: {self._last}")
        elif self._patience_s < wait_s < math.inf:
            # What those in flight reserved comes back in part when they are answered.
            if self.limiter.window.in_flight and self.limiter.paused_until <= now:
                return
            raise Parked(wait_s, self.why())

    def leave(self) -> None:
        """The place in the window is free again."""
        self.limiter.leave()
        self.moved.set()

    def answered(
        self, reserved: Charge, actual: Charge, entered_at: float, headers: Mapping[str, str]
    ) -> None:
        """An answer came and named what it used, and perhaps the limits."""
        self._refused_in_a_row = 0
        self.breaker.answered()
        self.limiter.learn(headers, self.clock.now())
        self.limiter.pace.accepted(entered_at)
        self.limiter.settle(reserved, actual, self.clock.now())
        self.limiter.window.grow(entered_at)

    def not_sent(self, reserved: Charge) -> None:
        """Nothing left this machine."""
        self.limiter.refund(reserved, self.clock.now())

    def failed(self, error: TeacherError, key: bytes, reserved: Charge, entered_at: float) -> None:
        """An attempt failed; the error says what the teacher may have counted.

        Not connected: all comes back. A 4xx counts as a request without tokens. After a timeout or a
        5xx the teacher may have counted all of it, so the reservation stays.
        """
        now = self.clock.now()
        self._last = error.message
        if error.error_code == open_files.CODE:  # our own shortage: the endpoint is not to blame
            self.limiter.refund(reserved, now)
            self.limiter.window.run_short()
            return
        if error.status is None and not error.maybe_billed:
            self.limiter.refund(reserved, now)
        elif error.status is not None and 400 <= error.status < 500:
            self.limiter.settle(reserved, Charge(0, 0), now)
        if error.headers:
            self.limiter.learn(error.headers, now)
        taught = error.status == 429 and self.limiter.refused(entered_at, now)
        told = error.retry_after_s is not None
        slows = error.status in _OVERLOAD or isinstance(error, AttemptTimeout)
        # A 429 that named its wait or taught a rate says nothing against the number in flight.
        if slows and not (error.status == 429 and (told or taught or entered_at <= self._taught_at)):
            self._refused_in_a_row += self.limiter.window.cut(entered_at, now)
        if taught:
            self._taught_at = now
        if isinstance(error, RateLimited) and (told or entered_at > self._taught_at):
            self.limiter.pause(self._pause_s(error), now, _ASKED if told else "refused without a time")
        elif isinstance(error, TeacherUnavailable | AttemptTimeout | ConnectionBroken):
            self._broke(key, entered_at, reached=error.status is not None or error.maybe_billed)

    def _broke(self, key: bytes, entered_at: float, *, reached: bool) -> None:
        now = self.clock.now()
        pause_s = self.breaker.failed(key, entered_at, now, reached=reached)
        if pause_s is not None:
            window = self.limiter.window
            window.size, window.threshold = 1.0, window.ceiling  # one goes to look, then quickly more
            self.limiter.pause(pause_s, now, LOOK)
            self.moved.set()

    def _pause_s(self, error: TeacherError) -> float:
        if error.retry_after_s is not None:
            return error.retry_after_s
        doubled = UNNAMED_PAUSE_S * 2.0 ** min(max(self._refused_in_a_row - 1, 0), 10)
        return min(LONGEST_UNNAMED_PAUSE_S, doubled)

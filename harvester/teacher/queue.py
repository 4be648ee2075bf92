"""Queue the requests to one endpoint, and pass what each reply says on to its limiter and circuit breaker.

The rules are those of `rate_limiter` and `circuit_breaker`; this module only waits. The queue is first in,
first out: its head waits for the limiter and all others wait behind it, so small requests can't starve a
large one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator, Mapping

from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
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
from harvester.teacher.answer_pace import AnswerPace
from harvester.teacher.circuit_breaker import CircuitBreaker
from harvester.teacher.limiter.limits import Charge
from harvester.teacher.limiter.rate_limiter import Limiter, RefusedRow
from harvester.teacher.limiter.sends import Entry

_OVERLOAD = frozenset({503, 529})
# A request that was admitted but would have to wait longer than this to be sent is withdrawn, so that it
# waits where a pause may park the pass.
LONGEST_DEPARTURE_WAIT_S = 1.0


class Withdrawn(Exception):
    """An admitted request was not sent: it has to be admitted again."""


class FreeElsewhere(Exception):
    """A request that waits here can be admitted at another endpoint at once."""

    def __init__(self, queue: EndpointQueue) -> None:
        super().__init__()
        self.queue = queue


class OtherEndpoints:
    """What an endpoint knows of the teacher's other endpoints. This base is for a teacher without any."""

    def is_another_up(self, endpoint: str) -> bool:
        """Whether an endpoint other than this one is up."""
        del endpoint
        return False

    def wake_others(self, endpoint: str) -> None:
        """Tell the requests that wait at others that this endpoint has a free place."""

    def departed(self) -> None:
        """Note that a request was sent: the window of its endpoint may have grown."""


class Elsewhere:
    """Where else a request could go that waits at an endpoint. This base is for one that could go nowhere."""

    def free(self) -> EndpointQueue | None:
        """Return another endpoint that would admit the request at once, None for none."""
        return None

    def soonest_s(self) -> float:
        """Return seconds until there may be one, infinity where that is not known."""
        return math.inf


class EndpointQueue:
    """Admits requests to one endpoint as its limiter and its circuit breaker allow.

    Args:
        draining: set once nothing new may be sent.
        patience_s: longest single wait, and longest time without any answer, before the pass parks.
        others: the teacher's other endpoints.

    Attributes:
        changed: set to make the head of the queue compute its wait again.
        hold_reason: why an operator or a watch holds the pass, "" when nothing does.
        aside_reason: why the endpoint gets no rows, as its answers are no good; "" for one that gets them.
        pace: how many answers came lately, and how long they took.
    """

    def __init__(
        self,
        endpoint: str,
        limiter: Limiter,
        clock: Clock,
        *,
        draining: asyncio.Event | None = None,
        patience_s: float = math.inf,
        others: OtherEndpoints | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.limiter = limiter
        self.clock = clock
        self.breaker = CircuitBreaker()
        self.draining = draining or asyncio.Event()
        self.changed = asyncio.Event()
        self.hold_reason = ""
        self.aside_reason = ""
        self.pace = AnswerPace()
        self._patience_s = patience_s
        self._others = others or OtherEndpoints()
        self._head_turn = asyncio.Lock()
        self._departure_turn = asyncio.Lock()
        self._queued = 0
        self._head = Charge(0, 0)
        self._last_error = ""
        self._refused_since: float | None = None

    def hold(self, reason: str) -> None:
        """Admit nothing for this reason; "" ends the hold, without a burst of saved-up requests."""
        if self.hold_reason and not reason:
            now = self.clock.now()
            self.limiter.end_bursts(now, now)
            self.breaker.restart_timer(now)
        self.hold_reason = reason
        self.changed.set()

    def waiting_reason(self) -> str:
        """Return what delays the next request, "" when nothing does."""
        if self.hold_reason:
            return self.hold_reason
        is_waiting = self._queued or self.limiter.departures.waiting
        return self.limiter.waiting_reason(self._head, self.clock.now()) if is_waiting else ""

    @property
    def state(self) -> tuple[str, str]:
        """What the endpoint does, as a word, and why; the reason is "" where there is nothing to say."""
        if self.aside_reason:
            return "aside", self.aside_reason
        if self.breaker.is_open:
            return "down", self._last_error
        paused_s = self.limiter.paused_until - self.clock.now()
        if self.hold_reason or paused_s > 0:
            return "paused", self.hold_reason or f"{self.limiter.pause_now.reason}, {paused_s:.0f} s"
        return "up", self.waiting_reason()

    @property
    def is_down(self) -> bool:
        """Whether the breaker is open, or the teacher asked for a wait beyond our patience."""
        return self.breaker.is_open or (self.limiter.paused_until - self.clock.now() > self._patience_s)

    @property
    def gets_rows(self) -> bool:
        """Whether the endpoint is up and not put aside."""
        return not self.is_down and not self.aside_reason

    def put_aside(self, reason: str) -> None:
        """Send no rows to this endpoint for this reason; "" lets it have rows again."""
        self.aside_reason = reason
        self.changed.set()
        self._others.wake_others("")

    def load(self, weight: float = 1.0) -> tuple[int, float]:
        """Return tier and load; the endpoint with the least is chosen.

        Tier 0: down, and due for a probe. Tier 1: up; the load is minus the free places of its window, times
        its weight, or where requests wait the number of those and of running ones per place. Tier 2: down.
        Tier 3: put aside.

        Args:
            weight: what a free place counts, relative to those of other endpoints.
        """
        window = self.limiter.window
        if self.aside_reason:
            return 3, 0.0
        if self.is_down:
            is_idle = not self._queued and not window.in_flight
            return (0 if is_idle and self.clock.now() >= self.limiter.paused_until else 2), 0.0
        taken = self._queued + window.in_flight
        free = int(window.size) - taken
        return 1, -free * weight if free > 0 else taken / (window.size * weight)

    def is_free(self, charge: Charge) -> bool:
        """Whether this charge would be admitted at once."""
        return self.free_in_s(charge) <= 0

    def free_in_s(self, charge: Charge) -> float:
        """Return seconds until this charge would be admitted if nobody waits; infinity if somebody does."""
        return math.inf if self._queued or not self.gets_rows else self._wait_s(charge)

    def wake_waiting(self) -> None:
        """Make the head of the queue, if there is one, look whether another endpoint is free."""
        if self._queued:
            self.changed.set()

    async def enter(
        self,
        charge: Charge,
        elsewhere: Elsewhere | None = None,
        *,
        is_probe: bool = False,
    ) -> Entry:
        """Wait until this charge is admitted; returns the admission. Every entry needs one `leave`.

        Args:
            elsewhere: None where the request can go nowhere else.
            is_probe: it asks this endpoint for its own sake, also while it is put aside.

        Raises:
            NotSent: the pass drains.
            Parked: the wait is longer than `patience_s`.
            EndpointDown: the endpoint went down meanwhile, and another one is up; or it was put aside.
            FreeElsewhere: it had to wait, and another endpoint is free.
        """
        if self.draining.is_set():
            raise NotSent
        if self.aside_reason and not is_probe:
            raise EndpointDown
        if self._queued or self._wait_s(charge) > 0:
            await self._wait_in_queue(charge, elsewhere or Elsewhere(), is_probe=is_probe)
        return self.limiter.enter(charge, self.clock.now())

    async def _wait_in_queue(self, charge: Charge, elsewhere: Elsewhere, *, is_probe: bool) -> None:
        self._queued += 1
        try:
            async with self._head_turn:
                self._head = charge
                while True:
                    if self.aside_reason and not is_probe:
                        raise EndpointDown
                    if (wait_s := self._wait_s(charge)) <= 0:
                        break
                    if self.draining.is_set():  # set before this request became the head
                        raise NotSent
                    if (other := elsewhere.free()) is not None:
                        raise FreeElsewhere(other)
                    self._require_useful_wait(wait_s)
                    self.changed.clear()
                    with self._waiting(wait_s, charge):
                        await self.clock.wait(self.changed, min(wait_s, elsewhere.soonest_s()))
                    if self.draining.is_set():
                        raise NotSent
        finally:
            self._queued -= 1

    def _wait_s(self, charge: Charge) -> float:
        return math.inf if self.hold_reason else self.limiter.wait_s(charge, self.clock.now())

    @contextlib.contextmanager
    def _waiting(self, wait_s: float, charge: Charge) -> Iterator[None]:
        """Count the time of the block where the rate is what this charge waits for."""
        limiter = self.limiter
        if not limiter.is_rate_reason(wait_s, charge, self.clock.now()):
            yield
            return
        limiter.rate_waits.begin(self.clock.now())
        try:
            yield
        finally:
            limiter.rate_waits.end(self.clock.now())

    def _require_useful_wait(self, wait_s: float) -> None:
        """Raise EndpointDown or Parked when there is no point in waiting here."""
        if self.hold_reason:
            return
        if self.is_down and self._others.is_another_up(self.endpoint):
            raise EndpointDown
        now = self.clock.now()
        if self.breaker.is_open:
            probe_in_s = max(0.0, self.limiter.paused_until - now)
            if self.breaker.down_s(now) + probe_in_s > self._patience_s:
                raise Parked(
                    probe_in_s, f"no answer from {self.endpoint}; the last attempt: {self._last_error}"
                )
        elif self._patience_s < wait_s < math.inf:
            # Part of what requests in flight reserved comes back when they are answered.
            if self.limiter.window.in_flight and self.limiter.paused_until <= now:
                return
            raise Parked(wait_s, self.waiting_reason())
        elif self._refused_since is not None and now - self._refused_since > self._patience_s:
            raise Parked(wait_s if wait_s < math.inf else 0.0, f"everything is refused: {self._last_error}")

    async def depart(self, entry: Entry, *, is_probe: bool = False) -> None:
        """Wait until this admitted request may be sent, in the order of the calls.

        Raises:
            Withdrawn: the pass drains, nothing may be sent for a while, or the endpoint was put aside.
        """
        async with self._departure_turn:
            while True:
                wait_s = self.limiter.departure_wait_s(self.clock.now())
                is_long = LONGEST_DEPARTURE_WAIT_S < wait_s < math.inf
                is_aside = self.aside_reason and not is_probe
                if self.draining.is_set() or self.hold_reason or is_long or is_aside:
                    raise Withdrawn
                if wait_s <= 0:
                    break
                self.changed.clear()
                with self._waiting(wait_s, Charge(0, 0)):
                    await self.clock.wait(self.changed, wait_s)
            self.limiter.departed(entry, self.clock.now())
        self.changed.set()
        self._others.departed()

    def leave(self, entry: Entry) -> None:
        """Free the request's place in the window."""
        self.limiter.leave(entry)
        self.changed.set()
        self._others.wake_others(self.endpoint)

    def answered(
        self, key: bytes, reserved: Charge, actual: Charge, entry: Entry, headers: Mapping[str, str]
    ) -> None:
        """Take note of an answer: what it used, and the limits its headers state."""
        now = self.clock.now()
        self._refused_since = None
        self.pace.answered(now, now - entry.at)
        self.breaker.answered()
        self._learn_from_headers(headers, now)
        self.limiter.settle(reserved, actual, now)
        self.limiter.answered(key, entry, now, actual.output_tokens)

    def _learn_from_headers(self, headers: Mapping[str, str], now: float) -> None:
        """Learn what the headers of a reply state; those that can't be understood teach nothing."""
        try:
            self.limiter.learn_from_headers(headers, now)
        except Exception:  # noqa: BLE001 - the answer beside them is paid for
            self._last_error = "the rate-limit headers can't be understood"

    def not_sent(self, reserved: Charge) -> None:
        """Give the reservation back: nothing left this machine."""
        self.limiter.refund(reserved, self.clock.now())

    def failed(self, error: TeacherError, key: bytes, reserved: Charge, entry: Entry) -> RefusedRow:
        """Take note of a failed attempt of the request `key`; returns what becomes of a refused row."""
        now = self.clock.now()
        self._last_error = error.message
        if error.error_code == open_files.CODE:  # a shortage of ours: the endpoint is not to blame
            self.limiter.refund(reserved, now)
            self.limiter.window.limit_to_open_connections()
            return RefusedRow()
        self._settle_failed(error, reserved, now)
        if error.headers:
            self._learn_from_headers(error.headers, now)
        is_broken_here = isinstance(error, BrokenAnswer) and self._others.is_another_up(self.endpoint)
        if is_broken_here or isinstance(error, TeacherUnavailable | AttemptTimeout | ConnectionBroken):
            is_reached = error.status is not None or error.maybe_billed
            self._count_failure(key, entry.at, is_reached=is_reached)
        return self._learn_from_failure(error, key, entry, now)

    def _learn_from_failure(self, error: TeacherError, key: bytes, entry: Entry, now: float) -> RefusedRow:
        """Tell the limiter what the failure says about rate and overload."""
        limiter = self.limiter
        if error.status in _OVERLOAD:
            limiter.overloaded(entry, now)
        if isinstance(error, RateLimited):
            self._refused_since = now if self._refused_since is None else self._refused_since
            return limiter.refused(key, entry, error.retry_after_s, now)
        if isinstance(error, AttemptTimeout):
            limiter.timed_out(entry, now)
        elif error.status not in _OVERLOAD:
            limiter.failed_otherwise(entry, now)
        return RefusedRow()

    def _settle_failed(self, error: TeacherError, reserved: Charge, now: float) -> None:
        """Correct the reservation by what the teacher may have counted.

        Not connected: nothing. A 4xx: one request without tokens. A timeout or a 5xx: possibly all of it, so
        the reservation stays.
        """
        if error.status is None and not error.maybe_billed:
            self.limiter.refund(reserved, now)
        elif error.status is not None and 400 <= error.status < 500:
            self.limiter.settle(reserved, Charge(0, 0), now)

    def _count_failure(self, key: bytes, entered_at: float, *, is_reached: bool) -> None:
        now = self.clock.now()
        pause_s = self.breaker.failed(key, entered_at, now, reached=is_reached)
        if pause_s is not None:
            self.limiter.window.restart()
            self.limiter.pause(pause_s, now, "the teacher fails; next probe", is_asked=False)
            self.changed.set()

"""The queue of one endpoint, on a virtual clock: order, reasons for waiting, draining, pauses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.config.teacher_section import LimitsSection
from harvester.errors import AttemptTimeout, NotSent, Parked, RateLimited, TeacherError, TeacherUnavailable
from harvester.teacher.limiter.limits import TOKENS_PER_MINUTE, Charge
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.limiter.sends import Entry
from harvester.teacher.queue import EndpointQueue


class VirtualClock:
    """A clock that stands still while any task can run, then jumps to the next wake-up."""

    def __init__(self) -> None:
        self.time = 0.0
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1.8e9 + self.time

    async def sleep(self, seconds: float) -> None:
        await self.wait(asyncio.Event(), seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        until: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not math.isinf(seconds):
            self._sleepers.append((self.time + max(seconds, 1e-6), until))
        waiting = asyncio.ensure_future(event.wait())
        await asyncio.wait({waiting, until}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        until.cancel()

    async def run(self, *work: Awaitable[Any]) -> list[Any]:
        """Gather, moving the time forward whenever all tasks wait."""
        complete = asyncio.gather(*work, return_exceptions=True)
        while not complete.done():
            for _ in range(20):
                await asyncio.sleep(0)
            self._sleepers = [(at, waiter) for at, waiter in self._sleepers if not waiter.done()]
            if self._sleepers and not complete.done():
                first = min(self._sleepers, key=lambda sleeper: sleeper[0])
                self.time = max(self.time, first[0])
                first[1].set_result(None)
        return await complete


def endpoint_queue(clock: VirtualClock, *, patience_s: float = math.inf, **limits: float) -> EndpointQueue:
    limiter = Limiter(LimitsSection.model_validate(limits), clock.now())
    return EndpointQueue("http://127.0.0.1:1/v1", limiter, clock, patience_s=patience_s)


async def sent(queue: EndpointQueue, charge: Charge) -> Entry:
    """Admit a request and send it at once."""
    entry = await queue.enter(charge)
    queue.limiter.departed(entry, queue.clock.now())
    return entry


def play(scenario: Callable[[VirtualClock], Awaitable[Any]]) -> Any:
    return asyncio.run(scenario(VirtualClock()))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=2, max_size=25),
    rate=st.integers(60, 60_000),
    window=st.integers(1, 8),
)
def test_first_come_first_served_and_never_above_the_limit(sizes: list[int], rate: int, window: int) -> None:
    async def scenario(clock: VirtualClock) -> list[tuple[float, int, int]]:
        queue = endpoint_queue(clock, tokens_per_minute=rate, max_concurrency=window)
        entered: list[tuple[float, int, int]] = []

        async def ask(number: int, tokens: int) -> None:
            entry = await queue.enter(Charge(tokens, 0))
            entered.append((clock.now(), number, tokens))
            await clock.sleep(0.01)
            queue.leave(entry)

        await clock.run(*(ask(number, tokens) for number, tokens in enumerate(sizes)))
        return entered

    entered = play(scenario)
    assert [number for _, number, _ in entered] == list(range(len(sizes)))
    burst = max(1.0, rate / 60 * 0.25, *sizes)
    for first in range(len(entered)):
        total = 0
        for at, _, tokens in entered[first:]:
            total += tokens
            assert total <= burst + rate / 60 * (at - entered[first][0]) + 1e-3 * total


def test_the_reason_is_that_of_the_head_of_the_queue() -> None:
    async def scenario(clock: VirtualClock) -> list[str]:
        queue = endpoint_queue(clock, tokens_per_minute=6000, requests_per_minute=60_000, max_concurrency=2)
        reasons: list[str] = []

        async def watch() -> None:
            await clock.sleep(0.0)
            reasons.append(queue.waiting_reason())
            queue.limiter.pause(90.0, clock.now(), "the teacher's Retry-After")
            reasons.append(queue.waiting_reason())

        (entry,) = await clock.run(queue.enter(Charge(5000, 0)))
        queue.leave(entry)
        await clock.run(queue.enter(Charge(10, 0)), watch())
        return reasons

    tokens, pause = play(scenario)
    assert tokens.startswith("tokens per minute, 5")
    assert pause == "the teacher's Retry-After, 90 s"


def test_only_waits_for_the_rate_show_that_a_larger_share_would_be_used() -> None:
    async def waited(reason: str) -> tuple[float, float, float]:
        """Return how long two requests waited for the rate, after 5 s, at the end, and a minute later."""
        clock = VirtualClock()
        limits: dict[str, float] = {"requests_per_minute": 6.0} if reason in {"rate", "drain"} else {}
        if reason == "day":
            limits = {"requests_per_day": 2.0}
        queue = endpoint_queue(clock, max_concurrency=1 if reason == "window" else 8, **limits)
        if reason == "pause":
            queue.limiter.pause(10.0, clock.now(), "a pause")
        total_s = queue.limiter.rate_waits.total_s

        async def ask() -> None:
            entry = await queue.enter(Charge(1, 1))
            try:
                await queue.depart(entry)
                await clock.sleep(10.0)
            finally:
                queue.leave(entry)

        async def watch() -> float:
            await clock.sleep(5.0)
            seconds = total_s(clock.now())
            if reason == "drain":
                queue.draining.set()
                queue.changed.set()
            return seconds

        *_, halfway = await clock.run(ask(), ask(), watch())
        return halfway, total_s(clock.now()), total_s(clock.now() + 60.0)

    assert asyncio.run(waited("rate")) == (pytest.approx(5.0), pytest.approx(10.0), pytest.approx(10.0))
    assert asyncio.run(waited("drain")) == (pytest.approx(5.0), pytest.approx(5.0), pytest.approx(5.0))
    for reason in ("window", "pause", "day"):
        assert asyncio.run(waited(reason)) == (0.0, 0.0, 0.0), reason


def test_a_larger_share_holds_for_the_next_request_at_once() -> None:
    limiter = Limiter(LimitsSection(requests_per_minute=600), 0.0)
    limiter.set_share(0.05, 0.0)
    limiter.departed(limiter.enter(Charge(1, 1), 0.0), 0.0)
    assert limiter.departure_wait_s(0.1) == pytest.approx(1.9, abs=0.15)  # one request in two seconds
    limiter.set_share(0.6, 0.1)
    assert limiter.departure_wait_s(0.1) < 1 / 6  # six a second
    limiter.pause(5.0, 0.1, "a pause")
    limiter.set_share(1.0, 0.1)
    assert limiter.departure_wait_s(0.1) >= 5.0


def test_a_drain_raises_not_sent_for_all_queued_requests() -> None:
    async def scenario(clock: VirtualClock) -> list[Any]:
        queue = endpoint_queue(clock, requests_per_minute=1)
        await queue.enter(Charge(1, 1))

        async def end() -> None:
            queue.draining.set()
            queue.changed.set()

        return await clock.run(*(queue.enter(Charge(1, 1)) for _ in range(5)), end())

    *errors, _ = play(scenario)
    assert [type(error) for error in errors] == [NotSent] * 5


def test_a_wait_beyond_patience_parks_unless_requests_in_flight_may_refund() -> None:
    async def scenario(clock: VirtualClock) -> tuple[Any, Any]:
        queue = endpoint_queue(clock, patience_s=60, tokens_per_day=8640)
        entry = await queue.enter(Charge(4320, 0))
        reserved = Charge(4320, 0)

        async def answer() -> None:
            await clock.sleep(5)
            queue.answered(b"k", reserved, Charge(20, 0), entry, {})
            queue.leave(entry)

        later, _ = await clock.run(queue.enter(Charge(400, 0)), answer())
        queue.leave(later)  # nothing is in flight any more, so nothing will be refunded
        (parked,) = await clock.run(queue.enter(Charge(4300, 0)))
        return later.at, parked

    entered, parked = play(scenario)
    assert entered == pytest.approx(5.0, abs=0.1)
    assert isinstance(parked, Parked)
    assert "tokens per day" in parked.reason


def test_a_retry_after_pauses_the_whole_endpoint_when_everything_is_refused() -> None:
    async def scenario(clock: VirtualClock) -> tuple[list[Any], float]:
        queue = endpoint_queue(clock, requests_per_minute=60_000)
        before = queue.limiter.window.size
        for number in range(3):
            entry = await sent(queue, Charge(1, 1))
            clock.time += 0.1
            error = RateLimited("slow down", status=429, retry_after_s=30.0)
            queue.failed(error, b"%d" % number, Charge(1, 1), entry)
            queue.leave(entry)
        (first,) = await clock.run(queue.enter(Charge(1, 1)))
        return first.at, queue.limiter.window.size / before

    entered_at, kept = play(scenario)
    assert entered_at >= 30.0
    assert kept == 1.0


def test_a_single_refusal_with_a_wait_among_answers_holds_its_own_row_only() -> None:
    async def scenario(clock: VirtualClock) -> tuple[float, float]:
        queue = endpoint_queue(clock, max_concurrency=16)
        entries = [await sent(queue, Charge(1, 1)) for _ in range(16)]
        clock.time = 0.5
        for number, entry in enumerate(entries[1:]):
            queue.answered(b"%d" % number, Charge(1, 1), Charge(1, 1), entry, {})
            queue.leave(entry)
        error = RateLimited("slow down", status=429, retry_after_s=1.0)
        verdict = queue.failed(error, b"k", Charge(1, 1), entries[0])
        queue.leave(entries[0])
        (entry,) = await clock.run(queue.enter(Charge(1, 1)))
        return verdict.wait_s, entry.at

    row_wait_s, entered_at = play(scenario)
    assert row_wait_s == 1.0
    assert entered_at < 0.6


def test_row_11_five_hundred_refusals_of_one_round_trip_are_one_cut() -> None:
    async def scenario(clock: VirtualClock) -> tuple[float, int]:
        queue = endpoint_queue(clock, max_concurrency=512)
        queue.limiter.window.size = 512.0
        entries = []
        for _ in range(500):
            clock.time += 0.01
            entries.append(await sent(queue, Charge(1, 1)))
        clock.time = 6.0
        for number, entry in enumerate(entries):
            queue.failed(RateLimited("slow down", status=529), b"%d" % number, Charge(1, 1), entry)
            queue.leave(entry)
        entered = 0
        clock.time = 7.0
        while queue.limiter.wait_s(Charge(1, 1), clock.now()) == 0:
            await sent(queue, Charge(1, 1))
            entered += 1
        return queue.limiter.window.size, entered

    size, entered = play(scenario)
    assert size >= 250
    assert entered == 1  # a probe; what else waits goes when it was not refused


@pytest.mark.parametrize(
    ("error", "back"),
    [
        (TeacherUnavailable("never left"), 1.0),
        (TeacherUnavailable("failed", status=500), 0.0),
        (AttemptTimeout("late", maybe_billed=True), 0.0),
    ],
)
def test_unsent_charges_are_refunded_and_possibly_counted_ones_stay(error: TeacherError, back: float) -> None:
    async def scenario(clock: VirtualClock) -> float:
        queue = endpoint_queue(clock, tokens_per_minute=240_000)
        clock.time = 10.0
        queue.limiter.wait_s(Charge(0, 0), clock.now())
        bucket = queue.limiter.buckets[TOKENS_PER_MINUTE]
        before = bucket.level
        entry = await queue.enter(Charge(100, 100))
        queue.failed(error, b"k", Charge(100, 100), entry)
        return 1.0 - (before - bucket.level) / 200

    assert play(scenario) == back

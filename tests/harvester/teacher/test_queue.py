"""The line at an endpoint's door, on a clock that is a number: its order, its reasons, its ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.config.config import LimitsSection
from harvester.errors import AttemptTimeout, NotSent, Parked, RateLimited, TeacherError, TeacherUnavailable
from harvester.teacher.limits import TOKENS_PER_MINUTE, Charge
from harvester.teacher.queue import EndpointQueue
from harvester.teacher.rate_limiter import Limiter


class Virtual:
    """Time stands still while anybody has something to do, then leaps to the next waiter's turn."""

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
        told = asyncio.ensure_future(event.wait())
        await asyncio.wait({told, until}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        until.cancel()

    async def run(self, *work: Awaitable[Any]) -> list[Any]:
        """Gather, moving time on whenever nobody can."""
        whole = asyncio.gather(*work, return_exceptions=True)
        while not whole.done():
            for _ in range(20):
                await asyncio.sleep(0)
            self._sleepers = [one for one in self._sleepers if not one[1].done()]
            if self._sleepers and not whole.done():
                first = min(self._sleepers, key=lambda one: one[0])
                self.time = max(self.time, first[0])
                first[1].set_result(None)
        return await whole


def door(clock: Virtual, *, patience_s: float = math.inf, **limits: float) -> EndpointQueue:
    limiter = Limiter(LimitsSection.model_validate(limits), clock.now())
    return EndpointQueue("http://127.0.0.1:1/v1", limiter, clock, patience_s=patience_s)


def play(story: Callable[[Virtual], Awaitable[Any]]) -> Any:
    return asyncio.run(story(Virtual()))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=2, max_size=25),
    rate=st.integers(60, 60_000),
    window=st.integers(1, 8),
)
def test_first_come_first_served_and_never_above_the_limit(sizes: list[int], rate: int, window: int) -> None:
    async def story(clock: Virtual) -> list[tuple[float, int, int]]:
        gate = door(clock, tokens_per_minute=rate, max_concurrency=window)
        entered: list[tuple[float, int, int]] = []

        async def ask(number: int, tokens: int) -> None:
            await gate.enter(Charge(tokens, 0))
            entered.append((clock.now(), number, tokens))
            await clock.sleep(0.01)
            gate.leave()

        await clock.run(*(ask(number, tokens) for number, tokens in enumerate(sizes)))
        return entered

    entered = play(story)
    assert [number for _, number, _ in entered] == list(range(len(sizes)))
    burst = max(1.0, rate / 60 * 0.25, *sizes)
    for first in range(len(entered)):
        total = 0
        for at, _, tokens in entered[first:]:
            total += tokens
            assert total <= burst + rate / 60 * (at - entered[first][0]) + 1e-3 * total


def test_it_says_why_the_head_of_the_line_waits() -> None:
    async def story(clock: Virtual) -> list[str]:
        gate = door(clock, tokens_per_minute=6000, requests_per_minute=60_000, max_concurrency=2)
        said: list[str] = []

        async def watch() -> None:
            await clock.sleep(0.0)
            said.append(gate.waiting_reason())
            gate.limiter.pause(90.0, clock.now(), "the teacher's Retry-After")
            said.append(gate.waiting_reason())

        await clock.run(gate.enter(Charge(5000, 0)))
        gate.leave()
        await clock.run(gate.enter(Charge(10, 0)), watch())
        return said

    tokens, pause = play(story)
    assert tokens.startswith("tokens per minute, 5")
    assert pause == "the teacher's Retry-After, 90 s"


def test_a_drain_sends_everybody_in_the_line_home() -> None:
    async def story(clock: Virtual) -> list[Any]:
        gate = door(clock, requests_per_minute=1)
        await gate.enter(Charge(1, 1))

        async def end() -> None:
            gate.draining.set()
            gate.changed.set()

        return await clock.run(*(gate.enter(Charge(1, 1)) for _ in range(5)), end())

    *sent_home, _ = play(story)
    assert [type(one) for one in sent_home] == [NotSent] * 5


def test_a_wait_beyond_our_patience_parks_but_not_while_room_may_come_back() -> None:
    async def story(clock: Virtual) -> tuple[Any, Any]:
        gate = door(clock, patience_s=60, tokens_per_day=8640)
        await gate.enter(Charge(4320, 0))
        reserved = Charge(4320, 0)

        async def answer() -> None:
            await clock.sleep(5)
            gate.answered(reserved, Charge(20, 0), 0.0, {})
            gate.leave()

        entered, _ = await clock.run(gate.enter(Charge(400, 0)), answer())
        gate.leave()  # nobody is in flight any more: nothing will come back
        (parked,) = await clock.run(gate.enter(Charge(4300, 0)))
        return entered, parked

    entered, parked = play(story)
    assert entered == pytest.approx(5.0, abs=0.1)
    assert isinstance(parked, Parked)
    assert "tokens per day" in parked.reason


def test_a_retry_after_stops_all_admission_not_one_request_and_leaves_the_window_alone() -> None:
    async def story(clock: Virtual) -> tuple[list[Any], float]:
        gate = door(clock, requests_per_minute=60_000)
        await gate.enter(Charge(1, 1))
        error = RateLimited("slow down", status=429, retry_after_s=30.0)
        before = gate.limiter.window.size
        gate.failed(error, b"k", Charge(1, 1), 0.0)
        gate.leave()
        return await clock.run(
            *(gate.enter(Charge(1, 1)) for _ in range(4))
        ), gate.limiter.window.size / before

    entered, kept = play(story)
    assert min(entered) >= 30.0
    assert sorted(entered) == entered
    assert kept == 1.0


def test_row_11_five_hundred_bare_refusals_of_one_round_are_one_cut() -> None:
    async def story(clock: Virtual) -> tuple[float, float]:
        gate = door(clock, max_concurrency=512)
        gate.limiter.window.size = 512.0
        for _ in range(500):
            await gate.enter(Charge(1, 1))
        clock.time = 1.0
        for _ in range(500):
            gate.failed(RateLimited("slow down", status=429), b"k", Charge(1, 1), 0.0)
            gate.leave()
        return gate.limiter.window.size, gate.limiter.paused_until

    size, until = play(story)
    assert size == 256.0
    assert 1.0 < until <= 2.0


@pytest.mark.parametrize(
    ("error", "back"),
    [
        (TeacherUnavailable("never left"), 1.0),
        (TeacherUnavailable("failed", status=500), 0.0),
        (AttemptTimeout("late", maybe_billed=True), 0.0),
    ],
)
def test_what_never_left_comes_back_and_what_may_have_counted_stays(error: TeacherError, back: float) -> None:
    async def story(clock: Virtual) -> float:
        gate = door(clock, tokens_per_minute=240_000)
        clock.time = 10.0
        gate.limiter.wait_s(Charge(0, 0), clock.now())
        bucket = gate.limiter.buckets[TOKENS_PER_MINUTE]
        before = bucket.level
        await gate.enter(Charge(100, 100))
        gate.failed(error, b"k", Charge(100, 100), clock.now())
        return 1.0 - (before - bucket.level) / 200

    assert play(story) == back

"""Several addresses of one teacher: whose turn, parts of the credential's limits, shares of bad answers.

Everything runs on a virtual clock: rates are exact, and nothing depends on the machine.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.api.types import Prompt, Request
from harvester.config.teacher_section import LimitsSection, RateLimitsSection
from harvester.errors import EndpointDown
from harvester.run.workers import WorkerPool
from harvester.teacher.answer_shares import AnswerShares
from harvester.teacher.budget import Budget
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.limiter.limits import REQUESTS_PER_DAY, REQUESTS_PER_MINUTE, Charge
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.policies import Policies
from harvester.teacher.queue import EndpointQueue, FreeElsewhere, Withdrawn
from harvester.teacher.retry import RetryPolicy
from harvester.teacher.sharing.credential_parts import CredentialParts
from tests.harvester.teacher.test_queue import VirtualClock

CHARGE = Charge(10, 10)
A_ROW = Request(b"k" * 32, Prompt("p", ()), {})


@dataclass(slots=True)
class Server:
    """Works on `slots` requests at once, each for `seconds`; the others queue."""

    slots: int
    seconds: float
    free_at: list[float] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)

    def send(self, now: float) -> float:
        """Return when the answer comes."""
        self.arrived.append(now)
        self.free_at = sorted(self.free_at or [0.0] * self.slots)
        begun = max(now, self.free_at[0])
        self.free_at[0] = begun + self.seconds
        return self.free_at[0]

    @property
    def rate(self) -> float:
        """Answers per second at most."""
        return self.slots / self.seconds


class Pass:
    """A pass of rows over simulated servers, with real endpoints and a real pool of workers."""

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        credential: Mapping[str, float] | None = None,
        own: Sequence[Mapping[str, float]] = (),
        weights: Sequence[float] = (),
    ) -> None:
        self.clock = VirtualClock()
        self.servers = {f"http://10.0.0.{n}/v1": server for n, server in enumerate(servers)}
        limits = LimitsSection.model_validate({"max_concurrency": 48, **(credential or {})})
        limiters = {
            url: Limiter(
                limits,
                0.0,
                own=RateLimitsSection.model_validate(own[n] if own else {}),
                part=1 / len(servers),
            )
            for n, url in enumerate(self.servers)
        }
        weighed = dict(zip(self.servers, weights or [1.0] * len(servers), strict=True))
        policies = Policies(limiters, Budget(), RetryPolicy(), self.clock, weights=weighed)
        self.endpoints = Endpoints(cast(Any, None), policies)
        self.pool = WorkerPool(64, lambda: self.endpoints.workers, self._serve, asyncio.Event())
        self.endpoints.on_room = self.pool.adjust
        self.most_workers_over = 0

    async def _serve(self, request: Request) -> None:
        while True:
            queue = self.endpoints.choose("", CHARGE)
            try:
                entry = await queue.enter(CHARGE, self.endpoints.elsewhere(queue.endpoint, "", CHARGE))
            except FreeElsewhere as free:
                queue = free.queue
                entry = await queue.enter(CHARGE)
            except EndpointDown:
                continue
            try:
                await queue.depart(entry)
            except Withdrawn:
                queue.leave(entry)
                continue
            break
        server = self.servers[queue.endpoint]
        now = self.clock.now()
        await self.clock.sleep(server.send(now) - now)
        server.answered.append(self.clock.now())
        queue.answered(request.key, CHARGE, CHARGE, entry, {})
        queue.leave(entry)

    async def _feed(self, rows: int) -> None:
        async with asyncio.TaskGroup() as group:
            self.pool.start(group)
            for _ in range(rows):
                await self.pool.put(A_ROW)
                places = [
                    max(int(queue.limiter.window.size), queue.limiter.window.in_flight)
                    for queue in self.endpoints.queues
                ]
                windows = sum(places) + sum(count < 48 for count in places)
                assert self.endpoints.workers == windows
                self.most_workers_over = max(self.most_workers_over, self.pool.size - windows)
            await self.pool.finish()

    def run(self, rows: int) -> None:
        """Answer so many rows."""
        (error,) = asyncio.run(self._run(rows))
        if error is not None:
            raise error

    async def _run(self, rows: int) -> list[Any]:
        return await self.clock.run(self._feed(rows))

    def rates(self, since: float, until: float) -> list[float]:
        """Answers per second of each server in a span."""
        return [
            sum(since <= at < until for at in server.answered) / (until - since)
            for server in self.servers.values()
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slots", "limits"])
def test_four_addresses_of_unequal_speed_reach_the_sum_of_their_rates(kind: str) -> None:
    rates = (50, 30, 15, 5)
    if kind == "slots":
        simulated = Pass([Server(rate // 5, 0.2) for rate in rates])
    else:
        own = [{"requests_per_minute": 60.0 * rate} for rate in rates]
        simulated = Pass([Server(1000, 0.2) for _ in rates], own=own)
    simulated.run(1500)
    found = simulated.rates(5.0, 13.0)
    assert sum(found) >= 0.95 * sum(rates)
    assert all(rate >= 0.9 * best for rate, best in zip(found, rates, strict=True))
    assert simulated.most_workers_over <= sum(rates)  # surplus ones leave after their row
    if kind == "limits":  # no address gets more than its own limit, with the burst of a quarter of a second
        for server, rate in zip(simulated.servers.values(), rates, strict=True):
            for at in server.arrived:
                assert sum(at <= other < at + 1 for other in server.arrived) <= 1.25 * rate + 2


def test_a_slow_address_holds_nobody_back() -> None:
    simulated = Pass([Server(8, 0.2), Server(1, 10.0)])
    simulated.run(400)
    quick, slow = simulated.servers.values()
    assert len(quick.answered) >= 0.9 * 400
    assert quick.answered[-1] <= 1.25 * 400 / quick.rate
    assert slow.answered


def test_free_places_count_by_weight() -> None:
    equal = Pass([Server(100, 0.2), Server(100, 0.2)], weights=[1, 1])
    heavy = Pass([Server(100, 0.2), Server(100, 0.2)], weights=[4, 1])
    for simulated in (equal, heavy):
        queues = simulated.endpoints.queues
        chosen: Counter[str] = Counter()
        for _ in range(10):
            queue = simulated.endpoints.choose("", CHARGE)
            queue.limiter.enter(CHARGE, 0.0)
            chosen[queue.endpoint] += 1
        by_url = [chosen[queue.endpoint] for queue in queues]
        assert by_url == ([5, 5] if simulated is equal else [10, 0])


@pytest.mark.slow
def test_the_limit_of_the_credential_goes_where_it_can_be_used() -> None:
    """60 a second for both; one server can do 10."""
    simulated = Pass([Server(1000, 0.2), Server(2, 0.2)], credential={"requests_per_minute": 3600})
    simulated.run(900)
    quick, slow = simulated.rates(5.0, 14.0)
    assert quick + slow >= 0.93 * 60
    arrived = sorted(at for server in simulated.servers.values() for at in server.arrived)
    for start in range(1, 14):
        assert sum(start <= at < start + 1 for at in arrived) <= 1.3 * 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rates", "limit", "latency_s"),
    [((50, 30, 15, 5), 80, 0.2), ((100, 60, 30, 10), 180, 0.2), ((5,) * 4, 4, 0.2)],
)
def test_addresses_at_their_own_limit_take_nothing_from_those_that_can_use_more(
    rates: tuple[int, ...], limit: int, latency_s: float
) -> None:
    servers = [Server(round(rate * latency_s), latency_s) for rate in rates]
    simulated = Pass(servers, credential={"requests_per_minute": 60.0 * limit})
    simulated.run(14 * limit)
    found = simulated.rates(6.0, 13.0)
    assert sum(found) >= 0.975 * limit
    arrived = sorted(at for server in servers for at in server.arrived)
    for start in range(1, 13):  # each address may save up one request, however small its part
        assert sum(start <= at < start + 1 for at in arrived) <= 1.3 * limit + len(rates)


seconds_of_use = st.lists(
    st.tuples(st.floats(0.5, 3.0), st.lists(st.integers(0, 40), min_size=3, max_size=3)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=25, deadline=None)
@given(seconds_of_use, st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.data())
def test_parts_are_the_whole_and_never_more(
    use: list[tuple[float, list[int]]], weights: list[float], data: st.DataObject
) -> None:
    """Whoever takes how much: together they never get more than the limit, by the minute and by the day."""
    limits = LimitsSection(requests_per_minute=600, requests_per_day=2000)
    urls = ["a", "b", "c"]
    limiters = {
        url: Limiter(limits, 0.0, part=weight / sum(weights))
        for url, weight in zip(urls, weights, strict=True)
    }
    parts = CredentialParts(limiters, dict(zip(urls, weights, strict=True)), 0.0)
    now, taken = 0.0, 0
    for seconds, wanted in use:
        now += seconds
        absent = data.draw(st.sets(st.sampled_from(urls), max_size=2))
        parts.divide(now, absent)
        assert sum(limiter.part for limiter in limiters.values()) == pytest.approx(1)
        for key, per_s in ((REQUESTS_PER_MINUTE, 10), (REQUESTS_PER_DAY, 1000 / 86_400)):
            rates = [limiter.buckets[key].rate for limiter in limiters.values()]
            assert sum(rates) == pytest.approx(per_s)
        for limiter, most in zip(limiters.values(), wanted, strict=True):
            for _ in range(most):
                if limiter.wait_s(CHARGE, now) > 0:
                    break
                entry = limiter.enter(CHARGE, now)
                taken += 1
                limiter.departed(entry, now)
                limiter.leave(entry)
        # Three buckets hold one unit at least, and admission runs a quarter of a second ahead.
        assert taken <= 3 + 2 * 2.5 + 10 * now + 3
        assert (
            sum(limiter.buckets[REQUESTS_PER_DAY].level for limiter in limiters.values()) >= 1000 - taken - 1
        )


def test_an_absent_address_leaves_its_part_to_the_others() -> None:
    limiters = {url: Limiter(LimitsSection(requests_per_minute=600), 0.0, part=0.5) for url in "ab"}
    parts = CredentialParts(limiters, {"a": 1.0, "b": 1.0}, 0.0)
    limiters["a"].rate_waits.begin(0.0)
    assert not parts.divide(0.1)
    assert parts.divide(1.0, ["b"])
    assert limiters["a"].part >= 0.9
    limiters["b"].rate_waits.begin(1.0)
    assert parts.divide(2.0)
    assert limiters["a"].part == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_hard_prompts_make_hardly_any_address_a_suspect(share: float) -> None:
    """The same share of bad answers everywhere, whatever it is, in clusters too: a check now and then."""
    suspicions = 0
    for seed in range(10):
        chance, shares = random.Random(seed), AnswerShares("abcd")
        for row in range(1500):
            is_cluster = (row // 40) % 5 == 0
            bad = chance.random() < (min(1.0, share + 0.3) if is_cluster else share)
            if shares.note(chance.choice("abcd"), A_ROW, is_bad=bad):
                suspicions += 1
                for url in "abcd":
                    shares.acquit(url)
    assert suspicions <= 3  # of 15,000 answers


@settings(max_examples=20, deadline=None)
@given(st.floats(0.0, 0.4), st.integers(0, 10**6))
def test_an_address_that_turned_is_a_suspect_soon(share: float, seed: int) -> None:
    chance, shares = random.Random(seed), AnswerShares("abcd")
    for _ in range(400):
        shares.note(chance.choice("abcd"), A_ROW, is_bad=chance.random() < share)
    for url in "abcd":
        shares.acquit(url)
    since = 0
    while "a" not in shares.suspects:
        url = chance.choice("abcd")
        since += url == "a"
        shares.note(url, A_ROW, is_bad=url == "a" or chance.random() < share)
        assert since < 60
    assert shares.rows("a") == [A_ROW] * 3


def test_a_row_does_not_wait_for_an_address_that_is_put_aside() -> None:
    async def scenario() -> list[str]:
        simulated = Pass([Server(1, 1.0), Server(1, 1.0)])
        first, second = simulated.endpoints.queues
        first.limiter.window.set_ceiling(1)
        held = await first.enter(CHARGE)
        went: list[str] = []

        async def row(queue: EndpointQueue) -> None:
            try:
                await queue.enter(CHARGE)
            except EndpointDown:
                went.append(simulated.endpoints.choose("", CHARGE).endpoint)

        waiting = asyncio.ensure_future(row(first))
        await asyncio.sleep(0)
        first.put_aside("noise")
        await waiting
        with pytest.raises(EndpointDown):
            await first.enter(CHARGE)
        with pytest.raises(Withdrawn):
            await first.depart(held)
        assert simulated.endpoints.may_put_aside(first.endpoint)
        assert not simulated.endpoints.may_put_aside(second.endpoint)
        assert first.state == ("aside", "noise")
        first.leave(held)
        probe = await first.enter(CHARGE, is_probe=True)
        await first.depart(probe, is_probe=True)
        return [*went, second.endpoint]

    went, second = asyncio.run(scenario())
    assert went == second

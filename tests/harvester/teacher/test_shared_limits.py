"""Harvests that share a limit use all of it; a dead one gives its share back."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import math
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from harvester.config.teacher_section import LimitsSection
from harvester.errors import HarvesterError
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import read_status, status_lines
from harvester.system.clock import SystemClock
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.limiter.sends import Entry
from harvester.teacher.sharing.fair_shares import Want, divide
from harvester.teacher.sharing.limit_leases import (
    EXPIRY_S,
    LedgerRow,
    LimitLedger,
    state_file,
    teacher_digest,
)
from harvester.teacher.sharing.shared_limits import RENEW_EVERY_S, Participant, SharedLimits
from tests.faults.bench import run_harvest
from tests.harvester.teacher.simulation import CHARGE, Reply, Server, TokenBucket

RATE = 200.0
URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


class Time(SystemClock):
    """A clock of numbers, which all simulated harvests share."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


@dataclass(eq=False)
class Client:
    """One simulated harvest. It sends as fast as it may, or `most_per_s` requests a second."""

    limiter: Limiter
    shared: SharedLimits
    most_per_s: float = math.inf
    is_alive: bool = True
    wakes_at: float = math.inf
    due_at: float = 0.0
    waits_for_rate: bool = False
    replies: list[tuple[float, int]] = field(default_factory=list)

    def rate(self, since: float, until: float) -> float:
        return sum(status == 200 and since < at <= until for at, status in self.replies) / (until - since)


class Simulation:
    """Several harvests and one server, on one clock."""

    def __init__(self, server: Server, count: int, **limits: float) -> None:
        self.clock, self.server = Time(), server
        self.begun = self.clock.at
        self.clients: list[Client] = []
        self.events: list[tuple[float, int, tuple[Any, ...]]] = []
        self.order = itertools.count()
        self.limits = LimitsSection.model_validate({"max_concurrency": 512, **limits})
        self.count = count

    def later(self, at: float, *what: object) -> None:
        heapq.heappush(self.events, (at, next(self.order), what))

    async def join(self, priority: int = 1, most_per_s: float = math.inf) -> Client:
        limiter = Limiter(self.limits, self.clock.at)
        shared = SharedLimits(
            {URL: limiter},
            Participant("key", priority, f"h{len(self.clients)}.toml"),
            clock=self.clock,
            changed=lambda: None,
            complain=pytest.fail,
        )
        await shared.join()
        client = Client(limiter, shared, most_per_s)
        self.clients.append(client)
        client.wakes_at = self.clock.at
        self.later(self.clock.at, "try", client)
        self.later(self.clock.at + RENEW_EVERY_S * random.Random(len(self.clients)).random(), "renew", client)
        return client

    async def run(self, until: float) -> None:
        while self.events and self.events[0][0] < self.begun + until:
            self.clock.at, _, (kind, client, *rest) = heapq.heappop(self.events)
            if kind == "try" and self.clock.at == client.wakes_at:
                client.wakes_at = math.inf
            if kind == "reply":
                self._reply(client, *rest)
            if kind == "renew" and client.is_alive:
                await client.shared.renew()
                self.later(self.clock.at + RENEW_EVERY_S, "renew", client)
            if client.is_alive:
                self._send(client)
        self.clock.at = self.begun + until

    def _send(self, client: Client) -> None:
        limiter, now = client.limiter, self.clock.at
        if client.waits_for_rate:
            limiter.rate_waits.end(now)
        while (wait_s := max(limiter.wait_s(CHARGE, now), client.due_at - now)) <= 0:
            entry = limiter.enter(CHARGE, now)
            if limiter.departure_wait_s(now) > 0:  # it comes back when it may leave
                limiter.leave(entry)
                limiter.refund(CHARGE, now)
                wait_s = limiter.departure_wait_s(now)
                break
            limiter.departed(entry, now)
            client.due_at = max(client.due_at, now - 0.05) + 1 / client.most_per_s
            reply = self.server.send(now, 0)
            self.later(reply.at, "reply", client, entry, reply)
        client.waits_for_rate = client.due_at <= now and limiter.is_rate_reason(wait_s, CHARGE, now)
        if client.waits_for_rate:
            limiter.rate_waits.begin(now)
        at = now + max(wait_s, 1e-3)
        if at < client.wakes_at:  # one look ahead at a time
            client.wakes_at = at
            self.later(at, "try", client)

    def _reply(self, client: Client, entry: Entry, reply: Reply) -> None:
        limiter, now = client.limiter, self.clock.at
        limiter.learn_from_headers(reply.headers, now)
        if reply.status == 200:
            limiter.settle(CHARGE, CHARGE, now)
            limiter.answered(b"", entry, now, 10)
        else:
            limiter.refused(b"%d" % next(self.order), entry, reply.retry_after_s, now)
        limiter.leave(entry)
        client.replies.append((now - self.begun, reply.status))

    def used(self, since: float, until: float) -> float:
        return sum(client.rate(since, until) for client in self.clients) / RATE

    def refused(self, since: float, until: float) -> float:
        statuses = [s for client in self.clients for at, s in client.replies if since < at <= until]
        return statuses.count(429) / len(statuses)


def told(**more: float) -> dict[str, float]:
    return {"requests_per_minute": RATE * 60, **more}


def server(seed: int = 1, *, rate: float = RATE, jitter: float = 0.0) -> TokenBucket:
    bucket = TokenBucket(random.Random(seed), rate, rate, jitter=jitter)
    bucket.at = 1000.0
    return bucket


@pytest.mark.parametrize(
    ("count", "is_stated"),
    [(2, False), (5, False), *(pytest.param(n, True, marks=pytest.mark.slow) for n in (2, 5))],
)
def test_all_of_a_limit_is_used_and_a_dead_one_gives_its_share_back(count: int, is_stated: bool) -> None:
    async def simulate() -> Simulation:
        simulation = Simulation(server(), count, **({} if is_stated else told()))
        if is_stated:
            headers = {"x-ratelimit-limit-requests": f"{RATE * 60:.0f}"}
            simulation.server.headers = lambda now: headers
        for _ in range(count):
            await simulation.join()
        await simulation.run(10.0)
        simulation.clients[0].is_alive = False
        await simulation.run(18.0)
        return simulation

    simulation = asyncio.run(simulate())
    assert simulation.used(3.0, 10.0) >= 0.95
    assert simulation.refused(0.0, 10.0) < 0.01
    rates = [client.rate(4.0, 10.0) for client in simulation.clients]
    assert min(rates) >= 0.85 * max(rates)
    assert simulation.used(10.0 + 5.0, 18.0) >= 0.95
    assert simulation.refused(10.0, 18.0) < 0.01


def test_priority_and_what_one_does_not_need() -> None:
    async def simulate() -> Simulation:
        simulation = Simulation(server(), 3, **told())
        await simulation.join(priority=3)
        await simulation.join()
        await simulation.run(10.0)
        await simulation.join(most_per_s=10.0)
        await simulation.run(25.0)
        return simulation

    simulation = asyncio.run(simulate())
    first, second, third = simulation.clients
    assert first.rate(4.0, 10.0) / second.rate(4.0, 10.0) == pytest.approx(3.0, rel=0.1)
    assert third.rate(15.0, 25.0) == pytest.approx(10.0, rel=0.1)
    assert simulation.used(15.0, 25.0) >= 0.95


@pytest.mark.parametrize("priorities", [(1, 1, 3), (3, 1, 1), (1, 3, 1)])
def test_a_share_of_less_than_a_request_per_renewal_does_not_stay_small(
    priorities: tuple[int, ...],
) -> None:
    """A harvest begins with a request in three seconds, and the first one is charged at this rate."""
    rate = 10.0

    async def simulate() -> Simulation:
        simulation = Simulation(server(rate=rate), 3, requests_per_minute=rate * 60)
        for number, priority in enumerate(priorities):
            await simulation.join(priority)
            await simulation.run((number + 1) * 0.3)
        await simulation.run(30.0)
        return simulation

    clients = asyncio.run(simulate()).clients
    rates = [client.rate(10.0, 30.0) for client in clients]
    assert rates == pytest.approx([rate * priority / 5 for priority in priorities], rel=0.1)
    assert all(client.rate(3.0, 10.0) > 0.15 * rate for client in clients)


def test_one_that_seldom_sends_leaves_the_rest_to_the_others() -> None:
    async def simulate() -> Simulation:
        simulation = Simulation(server(rate=10.0), 2, requests_per_minute=600)
        await simulation.join()
        await simulation.join(priority=3, most_per_s=0.5)
        await simulation.run(40.0)
        return simulation

    busy, seldom = asyncio.run(simulate()).clients
    assert seldom.rate(10.0, 40.0) == pytest.approx(0.5, rel=0.1)
    assert busy.rate(10.0, 40.0) >= 8.5


@pytest.mark.slow
def test_a_limit_that_nobody_was_told_is_learned_by_all() -> None:
    """How much is used and refused depends on chance, so it is the mean over several servers that counts."""

    async def simulate(seed: int) -> Simulation:
        simulation = Simulation(server(seed, jitter=0.1), 3)
        for _ in range(3):
            await simulation.join()
        await simulation.run(40.0)
        for client in simulation.clients:
            await client.shared.leave()
        return simulation

    simulations = [asyncio.run(simulate(seed)) for seed in range(3)]
    assert fmean(simulation.used(10.0, 40.0) for simulation in simulations) >= 0.92
    assert fmean(simulation.refused(10.0, 40.0) for simulation in simulations) < 0.03
    for simulation in simulations:
        totals = [client.limiter.learned_rate.lesson()[0] for client in simulation.clients]
        assert max(totals) <= 2 * min(totals)


def test_shares_are_fair_and_whole() -> None:
    assert divide({"a": Want(1), "b": Want(1)}) == {"a": 0.5, "b": 0.5}
    assert divide({"a": Want(3), "b": Want(1)}) == {"a": 0.75, "b": 0.25}
    assert divide({"a": Want(1, 0.1), "b": Want(1), "c": Want(1)}) == pytest.approx(
        {"a": 0.1, "b": 0.45, "c": 0.45}
    )
    assert sum(divide({"a": Want(1, 0.1), "b": Want(2, 0.2)}).values()) == pytest.approx(1.0)
    for seed in range(50):
        chance = random.Random(seed)
        wants = {
            str(n): Want(chance.randint(1, 5), chance.choice([math.inf, chance.random()])) for n in range(6)
        }
        shares = divide(wants)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert all(shares[name] >= 0 for name in wants)


def dead_process() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def row(name: str, at: float, **changes: Any) -> LedgerRow:
    return LedgerRow(
        **{"teacher": "t", "id": name, "pid": 1, "config": "c", "at": at, "weight": 1.0, **changes}
    )


def test_granted_shares_never_add_up_to_more_than_the_whole() -> None:
    ledger = LimitLedger(state_file())
    try:
        alone, others = ledger.renew(row("a", 0.0))
        assert (alone, others) == (1.0, [])
        second, (other,) = ledger.renew(row("b", 0.1))
        assert (second, other.share) == (pytest.approx(0.05), 1.0)  # a tenth of its part, until a gives way
        first, _ = ledger.renew(row("a", 0.5, share=alone))
        second, _ = ledger.renew(row("b", 0.6, share=second))
        assert (first, second) == (0.5, 0.5)
        # Another teacher is no concern, and one that is not renewed is dead.
        assert ledger.renew(row("c", 1.0, teacher="u"))[0] == 1.0
        first, others = ledger.renew(row("a", 0.7 + EXPIRY_S, share=first))
        assert (first, others) == (1.0, [])
        ledger.renew(row("b", 4.0, pid=dead_process()))
        assert ledger.renew(row("a", 4.5, share=first))[0] < 1.0
        assert ledger.renew(row("a", 5.1, share=first)) == (1.0, [])
    finally:
        ledger.leave("a")
    with contextlib.closing(LimitLedger(state_file())) as ledger:
        assert ledger.renew(row("d", 5.2))[1] == []


def test_a_renewal_that_goes_on_in_its_thread_does_not_bring_back_a_harvest_that_has_left() -> None:
    for _ in range(20):  # which of the two comes first is up to the system
        ledger = LimitLedger(state_file())
        with (
            contextlib.closing(sqlite3.connect(state_file(), isolation_level=None)) as other,
            ThreadPoolExecutor(max_workers=1) as threads,
        ):
            other.execute("BEGIN IMMEDIATE")
            renewal = threads.submit(ledger.renew, row("a", 0.0))
            while not renewal.running():
                time.sleep(0.001)
            other.execute("COMMIT")
            ledger.leave("a")
            with contextlib.suppress(sqlite3.Error):  # it came too late, or was busy for too long
                renewal.result()
            assert other.execute("SELECT count(*) FROM harvests").fetchone() == (0,)


def test_a_damaged_ledger_is_made_anew_and_an_unusable_one_stops_no_run(
    state: Path, mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    path = state_file()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database" * 100)
    ledger = LimitLedger(path)
    assert ledger.renew(row("a", 0.0))[0] == 1.0
    ledger.close()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert run_harvest(mock_teacher(accuracy=1.0), tmp_path).exit_code == 0
    assert not (tmp_path / "elsewhere").exists()


UNSHARED = "limits are not shared with other harvests of this machine: "


@pytest.mark.parametrize("share_limits", [True, False])
def test_an_unusable_state_folder_is_reported_once(
    mock_teacher: Callable[..., RunningMock],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share_limits: bool,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nope")
    run = {"share_limits": share_limits}
    assert run_harvest(mock_teacher(accuracy=1.0), tmp_path, run=run).exit_code == 0
    status = read_status(tmp_path / "store")
    complaints = [text for text in status["complaints"] if UNSHARED in text]
    assert len(complaints) == share_limits
    for complaint in complaints:
        assert "/proc/nope" in complaint
        assert (
            "set XDG_STATE_HOME to a folder that can be written, or [run] share_limits = false" in complaint
        )
        assert f"complaint {complaint}" in status_lines(status)


def test_a_ledger_that_stays_busy_is_reported_once_and_used_when_it_is_free(tmp_path: Path) -> None:
    del tmp_path
    complaints: list[HarvesterError] = []

    async def share() -> tuple[float, float]:
        clock, limiter = Time(), Limiter(LimitsSection(), 1000.0)
        with contextlib.closing(LimitLedger(state_file())) as ledger:
            ledger.renew(row("other", clock.at, teacher=teacher_digest(URL, "key")))
        shared = SharedLimits(
            {URL: limiter},
            Participant("key", 1, "c"),
            clock=clock,
            changed=lambda: None,
            complain=complaints.append,
        )
        with contextlib.closing(sqlite3.connect(state_file(), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await shared.join()
            assert complaints == []
            clock.at += EXPIRY_S + 0.1
            await shared.join()
            await shared.join()
        before, clock.at = limiter.share, 1000.5
        await shared.join()
        await shared.leave()
        return before, limiter.share

    before, after = asyncio.run(share())
    assert (before, after) == (1.0, pytest.approx(0.05))
    (complaint,) = complaints
    assert UNSHARED in str(complaint)
    assert "locked" in str(complaint)


@pytest.mark.parametrize("value", ["", "state", "./state"])
def test_a_state_folder_that_is_not_absolute_is_ignored(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_file() == tmp_path / ".local" / "state" / "harvester" / "shared_limits.db"


def test_a_run_shares_and_says_with_whom(mock_teacher: Callable[..., RunningMock], tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0)
    name = teacher_digest(mock.base_url, None)
    assert teacher_digest(mock.base_url, "key") != name
    clock = SystemClock()
    ledger = LimitLedger(state_file())
    ledger.renew(row("other", clock.now(), teacher=name, pid=7, config="/h/other.toml", weight=3.0))
    seen: list[dict[str, Any]] = []
    assert (
        run_harvest(mock, tmp_path, clock=clock, watch=lambda status: seen.append(dict(status))).exit_code
        == 0
    )
    leases = [status["shared"] for status in seen if status.get("shared")]
    (lease,) = leases[0]
    (other,) = lease["others"]
    assert (other["pid"], other["config"], other["priority"]) == (7, "/h/other.toml", 3.0)
    assert lease["share"] < 1
    living = {**read_status(tmp_path / "store"), "state": "running", "shared": leases[0]}
    assert any("/h/other.toml (pid 7) has" in line for line in status_lines(living))
    # It has left, and its own rows with it.
    assert [each.id for each in ledger.renew(row("x", clock.now(), teacher=name))[1]] == ["other"]
    seen.clear()
    ended = run_harvest(mock, tmp_path, prompts=["What is 1 + 2?"], run={"share_limits": False}, clock=clock)
    assert ended.exit_code == 0
    ledger.close()

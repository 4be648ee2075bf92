"""Simulate servers with limits, and a client that asks them through a `Limiter`, on a clock of numbers.

Servers take the time of a send and say when the reply comes and what it is. Nothing waits; 60 simulated
seconds at 200 requests a second take about a second.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harvester.config.teacher_section import LimitsSection
from harvester.teacher.limiter.limits import Charge
from harvester.teacher.limiter.rate_limiter import Limiter, RefusedRow
from harvester.teacher.limiter.sends import Entry

CHARGE = Charge(10, 10)
# Commits of the journal begin at least this long one after the other, as in `store.journal.group_commit`.
GROUP_S = 0.02


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answers."""

    at: float
    status: int = 200
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Server:
    """Accepts everything; answers after a latency."""

    def __init__(self, chance: random.Random, latency_s: float = 0.2, jitter: float = 0.0) -> None:
        self.chance = chance
        self.latency_s = latency_s
        self.jitter = jitter
        self.refusal_delay_s = 0.001
        self.retry_after: Callable[[float], float | None] = lambda now: None
        self.headers: Callable[[float], Mapping[str, str]] = lambda now: {}
        self.unrelated = 0.0
        self.unrelated_wait_s: float | None = None
        self.unrelated_refusals = 0
        self.status = 429
        # When a request that arrives at a time is looked at: later where the server stands still meanwhile.
        self.looked_at: Callable[[float], float] = lambda now: now

    def admits(self, now: float) -> bool:
        return True

    def service_s(self) -> float:
        return self.latency_s * (1 + self.jitter * (2 * self.chance.random() - 1))

    def send(self, now: float, row: int) -> Reply:
        now = self.looked_at(now)
        if self.unrelated and self.chance.random() < self.unrelated:
            self.unrelated_refusals += 1
            return Reply(now + self.refusal_delay_s, 429, self.unrelated_wait_s)
        if not self.admits(now):
            wait_s = self.retry_after(now)
            return Reply(now + self.refusal_delay_s, self.status, wait_s, self.headers(now))
        return Reply(now + self.service_s(), 200, None, self.headers(now))


class TokenBucket(Server):
    """Admits `rate` per second and `burst` at once. nginx's `limit_req ... nodelay` is one with burst + 1."""

    def __init__(self, chance: random.Random, rate: float, burst: float, **more: float) -> None:
        super().__init__(chance, **more)
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def admits(self, now: float) -> bool:
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1 - 1e-9:
            return False
        self.level -= 1
        return True


class FixedWindow(Server):
    """Admits `limit` in each window of `window_s`, counted from a fixed instant."""

    def __init__(self, chance: random.Random, limit: int, window_s: float, **more: float) -> None:
        super().__init__(chance, **more)
        self.limit, self.window_s, self.count, self.window = limit, window_s, 0, -1
        self.offset_s = chance.random() * window_s

    def admits(self, now: float) -> bool:
        window = int((now + self.offset_s) // self.window_s)
        if window != self.window:
            self.window, self.count = window, 0
        self.count += 1
        return self.count <= self.limit

    def left_s(self, now: float) -> float:
        return self.window_s - (now + self.offset_s) % self.window_s


class SlidingWindow(Server):
    """Admits `limit` in any span of `window_s`."""

    def __init__(self, chance: random.Random, limit: int, window_s: float, **more: float) -> None:
        super().__init__(chance, **more)
        self.limit, self.window_s, self.log = limit, window_s, deque[float]()

    def admits(self, now: float) -> bool:
        while self.log and self.log[0] <= now - self.window_s:
            self.log.popleft()
        if len(self.log) >= self.limit:
            return False
        self.log.append(now)
        return True


class ConcurrencyCap(Server):
    """Admits while fewer than `slots` are in work."""

    def __init__(self, chance: random.Random, slots: int, **more: float) -> None:
        super().__init__(chance, **more)
        self.slots, self.busy = slots, list[float]()

    def send(self, now: float, row: int) -> Reply:
        reply = super().send(now, row)
        if reply.status == 200:
            heapq.heappush(self.busy, reply.at)
        return reply

    def admits(self, now: float) -> bool:
        while self.busy and self.busy[0] <= now:
            heapq.heappop(self.busy)
        return len(self.busy) < self.slots


class QueueingServer(Server):
    """Works on `slots` at once and queues all others without a bound."""

    def __init__(self, chance: random.Random, slots: int, **more: float) -> None:
        super().__init__(chance, **more)
        self.free = [0.0] * slots

    def send(self, now: float, row: int) -> Reply:
        begun = max(now, heapq.heappop(self.free))
        ended = begun + self.service_s()
        heapq.heappush(self.free, ended)
        return Reply(ended)


class BatchingServer(Server):
    """Answers everything at once, each the slower the more there are: throughput grows, ever less."""

    def __init__(self, chance: random.Random, half: float, **more: float) -> None:
        super().__init__(chance, **more)
        self.half, self.busy = half, list[float]()

    def send(self, now: float, row: int) -> Reply:
        while self.busy and self.busy[0] <= now:
            heapq.heappop(self.busy)
        ended = now + self.service_s() * (1 + len(self.busy) / self.half)
        heapq.heappush(self.busy, ended)
        return Reply(ended)


class Standstills:
    """Times in which a server or a client does nothing: at random, of random length.

    Args:
        every_s: mean time from one to the next.
        longest_s: they last between a fifth of this and this.
    """

    def __init__(self, chance: random.Random, every_s: float, longest_s: float) -> None:
        self.chance, self.every_s, self.longest_s = chance, every_s, longest_s
        self.begins_at = self.ends_at = 0.0

    def end_of(self, now: float) -> float:
        """When the one at `now` ends; `now` where there is none."""
        while self.ends_at <= now:
            self.begins_at = self.ends_at + self.chance.expovariate(1 / self.every_s)
            self.ends_at = self.begins_at + self.longest_s * self.chance.uniform(0.2, 1)
        return self.ends_at if self.begins_at <= now else now

    def left_s(self, now: float) -> float:
        """Seconds that the one at `now` still lasts."""
        return self.end_of(now) - now


@dataclass(slots=True)
class Result:
    """What happened: (time, status) of each reply, with 0 for a timeout, and the rows given up."""

    replies: list[tuple[float, int]] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)
    sends: int = 0
    most_in_flight: int = 0
    ended_at: float = 0.0

    def count(self, status: int, since: float = -math.inf, until: float = math.inf) -> int:
        return sum(code == status and since < at <= until for at, code in self.replies)

    def rate(self, since: float, until: float) -> float:
        """Answers per second in a span."""
        return self.count(200, since, until) / (until - since)

    def refused(self, since: float = 0.0, until: float = math.inf) -> float:
        """Share of the replies in a span that are refusals."""
        total = sum(since < at <= until for at, _ in self.replies)
        return 1 - (self.count(200, since, until) + self.count(0, since, until)) / max(1, total)


def ask(  # noqa: C901 - one loop over events
    server: Server,
    *,
    rows: int = 10**9,
    until: float = math.inf,
    deadline_s: float = math.inf,
    stall: Callable[[float], float] = lambda now: 0.0,
    poison: Callable[[int], bool] = lambda row: False,
    limiter: Limiter | None = None,
    workers: int | None = None,
    commit_s: Callable[[], float] = lambda: 0.002,
    **limits: float,
) -> Result:
    """Ask `rows` rows, or as many as are answered by `until`, through one limiter.

    Args:
        stall: seconds that the client's loop stands still after an event at this time.
        poison: whether a row is refused whatever the server says.
        commit_s: seconds that a commit of the journal takes; a request is sent after it.
    """
    settings = LimitsSection.model_validate(limits)
    limiter = limiter or Limiter(settings, 0.0, deadline_s=deadline_s)
    most = workers or settings.max_concurrency
    result, events, order = Result(), list[tuple[float, int, tuple[object, ...]]](), itertools.count()
    fresh, ready, waiting, now = iter(range(rows)), deque[int](), 0, 0.0
    next_row = next(fresh, None)

    def later(at: float, *what: object) -> None:
        heapq.heappush(events, (at, next(order), what))

    wake_at, departs_at, commits_at = 0.0, math.inf, -math.inf
    uncommitted, committing, departing = (
        list[tuple[int, Entry]](),
        list[tuple[int, Entry]](),
        deque[tuple[int, Entry]](),
    )
    later(wake_at, "wake")

    def commit() -> None:
        """Begin a commit of what was admitted, GROUP_S after the begin of the last one."""
        nonlocal commits_at
        if uncommitted and not committing:
            begun_at = max(now, commits_at + GROUP_S)
            commits_at = begun_at
            committing.append(uncommitted[0])
            later(begun_at, "begun")

    while events and now < until:
        at, _, what = heapq.heappop(events)
        if (what[0] == "wake" and at != wake_at) or (what[0] == "depart" and at != departs_at):
            continue  # an earlier one took its place
        now = max(now, at)
        now += stall(now)
        if what[0] == "wake":
            wake_at = math.inf
        elif what[0] == "depart":
            departs_at = math.inf
        elif what[0] == "begun":
            committing[:] = uncommitted
            uncommitted.clear()
            later(now + commit_s(), "committed")
        elif what[0] == "committed":
            departing.extend(committing)
            committing.clear()
            commit()
        elif what[0] == "retry":
            waiting -= 1
            ready.append(what[1])  # type: ignore[arg-type]
        else:
            _, row, entry, reply = what
            verdict = None
            if reply.status == 0:  # type: ignore[attr-defined]
                limiter.timed_out(entry, now)  # type: ignore[arg-type]
                verdict = RefusedRow(0.5)
            elif reply.status == 200:  # type: ignore[attr-defined]
                limiter.learn_from_headers(reply.headers, now)  # type: ignore[attr-defined]
                limiter.settle(CHARGE, CHARGE, now)
                limiter.answered(b"%d" % row, entry, now, 10)  # type: ignore[arg-type,str-bytes-safe]
            else:
                limiter.learn_from_headers(reply.headers, now)  # type: ignore[attr-defined]
                if reply.status == 429:  # type: ignore[attr-defined]
                    wait_s = reply.retry_after_s  # type: ignore[attr-defined]
                    verdict = limiter.refused(b"%d" % row, entry, wait_s, now)  # type: ignore[arg-type]
                else:
                    limiter.overloaded(entry, now)  # type: ignore[arg-type]
                    verdict = RefusedRow(0.25)
            limiter.leave(entry)  # type: ignore[arg-type]
            result.replies.append((now, reply.status))  # type: ignore[attr-defined]
            if verdict is not None and verdict.is_row_at_fault:
                result.given_up.append(row)  # type: ignore[arg-type]
            elif verdict is not None:
                waiting += 1
                later(now + max(verdict.wait_s, 1e-6), "retry", row)
        while (ready or next_row is not None) and waiting + limiter.window.in_flight < most:
            wait_s = limiter.wait_s(CHARGE, now)
            if wait_s > 0:
                wait_s = max(wait_s, 1e-6)
                if now + wait_s < wake_at - 1e-9:
                    wake_at = now + wait_s
                    later(wake_at, "wake")
                break
            row = ready.popleft() if ready else next_row
            if row is next_row:
                next_row = next(fresh, None)
            uncommitted.append((row, limiter.enter(CHARGE, now)))  # type: ignore[arg-type]
            commit()
        while departing:
            wait_s = limiter.departure_wait_s(now)
            if wait_s > 0:
                if now + wait_s < departs_at - 1e-9:  # not if it waits for an answer
                    departs_at = now + max(wait_s, 1e-6)
                    later(departs_at, "depart")
                break
            row, entry = departing.popleft()
            limiter.departed(entry, now)
            result.sends += 1
            result.most_in_flight = max(result.most_in_flight, entry.in_flight)
            reply = Reply(now + 0.05, 429) if poison(row) else server.send(now, row)
            if reply.at - now > deadline_s:
                reply = Reply(now + deadline_s, 0)
            later(reply.at, "reply", row, entry, reply)
            if now < wake_at:
                wake_at = now
                later(wake_at, "wake")
        if next_row is None and not ready and not waiting and not limiter.window.in_flight:
            break
    result.ended_at = now
    return result

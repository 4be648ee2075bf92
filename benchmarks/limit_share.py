"""Measure which share of a teacher's limit a harvest uses, and which share of its requests is refused.

    python benchmarks/limit_share.py [--seconds 60] [--only configured] [--only nginx_nothing] ...

The teacher is the mock teacher in a process: 200 requests/s, 0.2 s latency, a burst of one second's worth.
Prints answers per second over the limit, without the first second, and 429s over requests sent. For a limit
that changes it prints when the harvest had settled: the mean of three seconds, three times in a row, was 90 %
of the new limit with less than 5 % refused. For comparison: a bare loop of 64 workers over httpx that
rest half a second after a 429.

The rows from `nginx_right` on run `harvester run` as a process, and compare its time from start to end with a
baseline: the time that the limit itself, the slots or the latency allow, or a bare client in the same run.
The share without the start of the process is printed beside it, and the load of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bare import HEADERS, bare_httpx
from limiting_server import Harvest, find_nginx, limiting_nginx, whole_harvest
from one_pass import Shots, bodies, configured, one_pass

from harvester.config.config import HarvestConfig
from harvester.mock_teacher.running import RunningMock, start_process
from harvester.observe.counters import Snapshot

RATE = 200
LATENCY_S = 0.2
BARE_WORKERS = 64
BARE_REST_S = 0.5
SETTLED_OVER, SETTLED_TIMES = 3, 3
SETTLED_SHARE, SETTLED_REFUSED = 0.9, 0.05


@dataclass(frozen=True, slots=True)
class Case:
    """What the harvester is told, whether the mock hides its limits, what is to be reached."""

    rpm: int | None
    hide: bool = False
    changes: tuple[tuple[float, int], ...] = ()  # share of the run, requests per minute
    goal: str = ""
    bare: bool = False


HALVED = ((1 / 3, RATE * 30), (2 / 3, RATE * 60))
CASES = {
    "configured": Case(RATE * 60, goal="0.97 with < 1 %"),
    "too_high": Case(RATE * 60 * 5, goal="0.92 with < 2 %"),
    "too_high_hidden": Case(RATE * 60 * 5, hide=True, goal="0.92 with < 2 %"),
    "unknown": Case(None, goal="0.92 with < 2 %"),
    "hidden": Case(None, hide=True, goal="0.92 with < 2 %"),
    "halved": Case(None, hide=True, changes=HALVED, goal="settled within 10 s each way"),
    "halved_told": Case(None, changes=HALVED, goal="settled within 10 s each way"),
    "bare": Case(None, hide=True, bare=True),
}


def measure(case: Case, seconds: float) -> tuple[Shots, list[float], dict[str, Any]]:
    """The counts over time, when the limit changed, and the mock's own count of what it received."""
    flags = ["--rpm", str(RATE * 60), "--latency", str(LATENCY_S), *(["--hide-limits"] if case.hide else [])]
    limits: dict[str, Any] = {"max_concurrency": 512}
    if case.rpm is not None:
        limits["requests_per_minute"] = case.rpm
    changed: list[float] = []
    with start_process(*flags) as mock:
        config = configured(mock.base_url, limits)
        if case.bare:
            answers = asyncio.run(_bare(config, seconds))
            return answers, [], mock.state()
        shots = asyncio.run(one_pass(config, seconds, lambda: _change(case, mock, seconds, changed)))
        return shots, changed, mock.state()


async def _change(case: Case, mock: RunningMock, seconds: float, changed: list[float]) -> None:
    at = 0.0
    for share, rpm in case.changes:
        await asyncio.sleep(share * seconds - at)
        at = share * seconds
        await asyncio.to_thread(mock.set_limits, rpm=rpm)
        changed.append(time.monotonic())


async def _bare(config: HarvestConfig, seconds: float) -> Shots:
    """64 workers that send again half a second after a refusal."""
    answers = refused = 0
    feed = bodies()
    until = time.monotonic() + seconds

    url = f"{config.teacher.base_url}/chat/completions"
    async with bare_httpx() as client:

        async def work() -> None:
            nonlocal answers, refused
            while time.monotonic() < until:
                status = (await client.post(url, content=next(feed), headers=HEADERS)).status_code
                answers += status == 200
                refused += status == 429
                if status == 429:
                    await asyncio.sleep(BARE_REST_S)

        shots: Shots = []
        workers = [asyncio.create_task(work()) for _ in range(BARE_WORKERS)]
        while time.monotonic() < until:
            shots.append((time.monotonic(), Snapshot(answers_stored=answers, rate_limited=refused)))
            await asyncio.sleep(0.2)
        await asyncio.gather(*workers)
    return shots


def by_second(shots: Shots) -> list[tuple[float, float, float]]:
    """Time, answers per second, and refused over sends, of each second."""
    result, (begun, last) = [], shots[0]
    for at, shot in shots:
        if at - begun >= 1.0:
            answers = shot.answers_stored - last.answers_stored
            refused = shot.rate_limited - last.rate_limited
            result.append((begun, answers / (at - begun), refused / max(1, answers + refused)))
            begun, last = at, shot
    return result


def settled_s(
    seconds: Sequence[tuple[float, float, float]], since: float, until: float, limit: float
) -> float:
    """Seconds from a change of the limit until the harvest had settled at it; infinity if it did not."""
    rows = [row for row in seconds if since <= row[0] < until]
    near = []
    for place in range(len(rows) - SETTLED_OVER + 1):
        few = rows[place : place + SETTLED_OVER]
        rate = sum(row[1] for row in few) / SETTLED_OVER
        refused = sum(row[2] for row in few) / SETTLED_OVER
        near.append(rate >= SETTLED_SHARE * limit and refused < SETTLED_REFUSED)
    for place in range(len(near) - SETTLED_TIMES + 1):
        if all(near[place : place + SETTLED_TIMES]):
            return rows[place][0] - since
    return float("inf")


def tell(name: str, seconds: float) -> None:
    """Measure one case and print it."""
    case = CASES[name]
    shots, changed, state = measure(case, seconds)
    begun = shots[0][0]
    body = [(at, shot) for at, shot in shots if 1 <= at - begun <= seconds]
    (first_at, first), (last_at, last) = body[0], body[-1]
    answers = (last.answers_stored - first.answers_stored) / (last_at - first_at)
    refused = state["statuses"].get("429", 0) / max(1, state["received"])
    goal = f"   to reach: {case.goal}" if case.goal else ""
    if not case.changes:
        print(f"{name:16} share of limit {answers / RATE:.3f}   refused {refused:.2%}{goal}", flush=True)
        return
    seconds_seen, ends = by_second(shots), [*changed[1:], begun + seconds]
    ways = [
        f"{rpm / 60:.0f}/s after {settled_s(seconds_seen, at, end, rpm / 60):.1f} s"
        for (_, rpm), at, end in zip(case.changes, changed, ends, strict=True)
    ]
    print(f"{name:16} settled at {', '.join(ways)}   refused {refused:.2%}{goal}")
    print("   answers/s:", *(f"{rate:.0f}" for _, rate, _ in seconds_seen))
    print("   refused %:", *(f"{100 * share:.0f}" for _, _, share in seconds_seen), flush=True)


BURST = 20
TOLD_ROWS, OTHER_ROWS = 4000, 8000


def _line(name: str, ideal_s: float, baseline: str, harvest: Harvest, refused: float, goal: str) -> str:
    text = (
        f"{name:16} {baseline} over whole process {ideal_s / harvest.whole_s:.3f}, over run "
        f"{ideal_s / harvest.run_s:.3f}   refused {refused:.2%}   load {os.getloadavg()[0]:.1f}"
        f"   to reach: {goal}"
    )
    return "\n   learned: ".join([text, *harvest.learned])


def tell_nginx(name: str, rpm: int | None, rows: int, goal: str) -> None:
    """nginx `limit_req`, HTML 429, no headers; the baseline is the time that its rate allows."""
    if find_nginx() is None:
        print(f"{name:16} left out: nginx is not installed")
        return
    limits: dict[str, Any] = {"max_concurrency": 512, **({} if rpm is None else {"requests_per_minute": rpm})}
    with limiting_nginx(RATE, BURST, LATENCY_S) as server:
        harvest = whole_harvest(server.base_url, rows, limits)
        statuses = server.statuses()
    refused = statuses.get("429", 0) / sum(statuses.values())
    print(_line(name, rows / RATE, "time at the limit", harvest, refused, goal), flush=True)


def tell_unrelated(name: str, rows: int = 400) -> None:
    """Refuse 5 % of the requests at random with `retry-after: 1`, beside a bare client that honours it."""
    fault = {"action": "status", "status": 429, "retry_after": 1, "probability": 0.05, "seed": 2}
    times, refused = [], 0.0
    for is_bare in (True, False):
        with start_process("--latency", "0.136") as mock:
            mock.set_faults([fault])
            if is_bare:
                times.append(asyncio.run(_bare_rows(mock.base_url, rows, 16)))
                continue
            harvest = whole_harvest(mock.base_url, rows, {"max_concurrency": 16})
            refused = mock.state()["statuses"].get("429", 0) / mock.state()["received"]
    print(_line(name, times[0], "a bare client's time", harvest, refused, "1 / 1.5 = 0.667"), flush=True)


async def _bare_rows(base_url: str, rows: int, workers: int) -> float:
    """Seconds in which workers get so many answers; each rests as long as a 429 says."""
    feed, left = bodies(), iter(range(rows))
    begun_at = time.monotonic()
    async with bare_httpx() as client:

        async def work() -> None:
            for _ in left:
                body = next(feed)
                while True:
                    reply = await client.post(f"{base_url}/chat/completions", content=body, headers=HEADERS)
                    if reply.status_code == 200:
                        break
                    await asyncio.sleep(float(reply.headers.get("retry-after", BARE_REST_S)))

        await asyncio.gather(*(work() for _ in range(workers)))
    return time.monotonic() - begun_at


def tell_window(name: str, rows: int = 400) -> None:
    """Twenty per two seconds, no headers; the baseline is the time that the limit allows."""
    flags = ["--rpm", "600", "--window", "2", "--hide-limits", "--latency", str(LATENCY_S)]
    with start_process(*flags) as mock:
        harvest = whole_harvest(mock.base_url, rows, {"max_concurrency": 64})
        state = mock.state()
    refused = state["statuses"].get("429", 0) / state["received"]
    print(_line(name, rows / 10, "time at the limit", harvest, refused, "0.95"), flush=True)


def tell_thousand(name: str, rows: int = 6000) -> None:
    """1,000 in flight, 0.5 to 1 s, no limit; the baseline is the time of 1,000 at the mean latency."""
    with start_process("--latency", "0.75", "--latency-jitter", "0.3333") as mock:
        harvest = whole_harvest(mock.base_url, rows, {"max_concurrency": 1000})
        most = mock.state()["most_in_flight"]
        bare_s = asyncio.run(_bare_rows(mock.base_url, rows, 1000))
    ideal_s = rows / 1000 * 0.75
    print(_line(name, ideal_s, "ideal time", harvest, 0.0, "1 / 1.25 = 0.8"))
    print(f"   most in flight {most}; a bare client with 1,000 workers: {bare_s:.1f} s", flush=True)


def tell_slots(name: str, rows: int = 296) -> None:
    """8 slots of 6 s that queue, deadline 15 s; the baseline is the best fixed window: 8 in flight."""
    harvests = []
    for limits in ({"max_concurrency": 8}, {}):
        with start_process("--slots", "8", "--slot-seconds", "6") as mock:
            harvests.append(whole_harvest(mock.base_url, rows, dict(limits), deadline_s=15))
    fixed, free = harvests
    print(_line(name, fixed.run_s, "time of a fixed window of 8", free, 0.0, "1 / 1.05 = 0.952"))
    print(
        f"   sent {free.sent} for {rows} rows, {free.late_timeouts} timeouts after 10 s (to reach: 0); "
        f"fixed window {fixed.run_s:.0f} s, ideal {math.ceil(rows / 8) * 6} s",
        flush=True,
    )


PROCESS_CASES: dict[str, Callable[[str], None]] = {
    "nginx_right": lambda name: tell_nginx(name, RATE * 60, TOLD_ROWS, "0.97 with < 1 %"),
    "nginx_too_high": lambda name: tell_nginx(name, RATE * 300, OTHER_ROWS, "0.92 with < 2 %"),
    "nginx_nothing": lambda name: tell_nginx(name, None, OTHER_ROWS, "0.92 with < 2 %"),
    "unrelated": tell_unrelated,
    "window": tell_window,
    "thousand": tell_thousand,
    "slots": tell_slots,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    names = [*CASES, *PROCESS_CASES]
    parser.add_argument("--only", "--case", choices=names, action="append", dest="only")
    chosen = parser.parse_args()
    for name in chosen.only or names:
        if name in CASES:
            tell(name, chosen.seconds)
        else:
            PROCESS_CASES[name](name)


if __name__ == "__main__":
    main()

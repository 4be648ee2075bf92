"""Measure answers per second of a harvest with everything on, and of bare loops against the same server.

    python benchmarks/throughput.py [--case fast|slow] [--rounds 3] [--seconds 8] [--own-server]

`fast`: 64 in flight, answers at once. `slow`: 1,000 in flight, answers after 0.5 to 1 s. Bare loops send
the same bodies and keep nothing: over httpx with an aiohttp transport (the baseline of the ratio), and over
aiohttp itself. Rounds alternate between them; the ratio is of medians. CPU is of this process, load side
left out.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from bare import HEADERS, bare_httpx
from load_side import load_side
from one_pass import bodies, everything_on, one_pass

from harvester.config.config import HarvestConfig

Send = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Case:
    """How many in flight, against which load side, seconds left out at the start, the ratio to reach."""

    in_flight: int
    slow: bool
    warm_s: float
    goal: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Answers per second, CPU milliseconds for each."""

    rate: float
    cpu_ms: float


CASES = {
    "fast": Case(64, slow=False, warm_s=1.0, goal=0.6),
    "slow": Case(1000, slow=True, warm_s=6.0, goal=0.95),
}


async def loop(send: Send, case: Case, seconds: float) -> Speed:
    """A fixed number of workers that send one body after the other."""
    feed = bodies()
    answers = 0
    until = time.monotonic() + case.warm_s + seconds

    async def work() -> None:
        nonlocal answers
        while time.monotonic() < until:
            assert b"choices" in await send(next(feed))
            answers += 1

    workers = [asyncio.create_task(work()) for _ in range(case.in_flight)]
    await asyncio.sleep(case.warm_s)
    before, at, cpu = answers, time.monotonic(), time.process_time()
    await asyncio.sleep(until - at)
    result = _speed(answers - before, time.monotonic() - at, time.process_time() - cpu)
    await asyncio.gather(*workers)
    return result


async def over_httpx(case: Case, config: HarvestConfig, seconds: float) -> Speed:
    """httpx.AsyncClient over an aiohttp transport, nothing else."""

    url = f"{config.teacher.base_url}/chat/completions"
    async with bare_httpx() as client:

        async def send(body: bytes) -> bytes:
            return (await client.post(url, content=body, headers=HEADERS)).content

        return await loop(send, case, seconds)


async def over_aiohttp(case: Case, config: HarvestConfig, seconds: float) -> Speed:
    """aiohttp.ClientSession, nothing else."""
    url = f"{config.teacher.base_url}/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send(body: bytes) -> bytes:
            async with session.post(url, data=body, headers=HEADERS) as response:
                return await response.read()

        return await loop(send, case, seconds)


async def ours(case: Case, config: HarvestConfig, seconds: float) -> Speed:
    """A pass with everything on, into a store on this disk."""
    begun, cpu_at = time.monotonic(), [0.0, 0.0]

    async def read_cpu() -> None:
        await asyncio.sleep(case.warm_s)
        cpu_at[0] = time.process_time()
        await asyncio.sleep(begun + case.warm_s + seconds - time.monotonic())
        cpu_at[1] = time.process_time()

    reading = asyncio.create_task(read_cpu())
    shots = await one_pass(config, case.warm_s + seconds)
    await reading
    body = [(at, shot) for at, shot in shots if case.warm_s <= at - begun <= case.warm_s + seconds]
    (first_at, first), (last_at, last) = body[0], body[-1]
    span_s, answers = last_at - first_at, last.answers_stored - first.answers_stored
    return _speed(answers, span_s, (cpu_at[1] - cpu_at[0]) * span_s / seconds)


def _speed(answers: int, span_s: float, cpu_s: float) -> Speed:
    return Speed(answers / span_s, 1000 * cpu_s / max(1, answers))


RUNNERS = {
    "bare httpx over aiohttp": over_httpx,
    "bare aiohttp": over_aiohttp,
    "harvest, everything on": ours,
}


def measure(name: str, rounds: int, seconds: float, own_server: bool) -> None:
    """Print one case."""
    case = CASES[name]
    result: dict[str, list[Speed]] = {runner: [] for runner in RUNNERS}
    with load_side(slow=case.slow, own=own_server) as load:
        config = everything_on(load.base_url, case.in_flight)
        for _ in range(rounds):
            for runner, run in RUNNERS.items():
                result[runner].append(asyncio.run(run(case, config, seconds)))
    wait = "0.5 to 1 s" if case.slow else "at once"
    print(f"{name}: {case.in_flight} in flight, answers {wait}, {load.kind}, median of {rounds}")
    base = statistics.median(speed.rate for speed in result["bare httpx over aiohttp"])
    for runner, speeds in result.items():
        rate = statistics.median(speed.rate for speed in speeds)
        cpu_ms = statistics.median(speed.cpu_ms for speed in speeds)
        each = " ".join(f"{speed.rate:.0f}" for speed in speeds)
        print(
            f"  {runner:24} {rate:7.0f}/s  {cpu_ms:.3f} ms CPU  ratio {rate / base:.2f}  ({each})", flush=True
        )
    print(f"  to reach: {case.goal}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="measured seconds of each loop and round")
    parser.add_argument("--own-server", action="store_true", help="do not use nginx")
    chosen = parser.parse_args()
    for name in chosen.case or CASES:
        measure(name, chosen.rounds, chosen.seconds, chosen.own_server)


if __name__ == "__main__":
    main()

"""Measure the memory of a run of 200,000 prompts, with sealing, and of a loop with a task for each row.

    python benchmarks/memory.py [--prompts 200000] [--in-flight 256] [--own-server]

Flat means: the peak of the last quarter is within 5 % of the peak of the second quarter (the first is
warm-up). Shards are of 1 MiB, so that sealing falls into every quarter. Tasks are counted on the event loop
five times a second. The bare loop (`asyncio.gather` over all rows, a semaphore, httpx over aiohttp) has a
tenth of the rows, and is scaled.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from bare import HEADERS, bare_httpx
from load_side import load_side
from one_pass import bodies, questions

from harvester.run import job
from harvester.run.prepare import prepare

BARE_SHARE = 10
PAGE = os.sysconf("SC_PAGE_SIZE")
TOML = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.limits]
requests_per_minute = 6_000_000
max_concurrency = {in_flight}
[prompts]
files = ["p.jsonl"]
[sampling]
max_tokens = 64
[store]
shard_mib = 1
"""


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE / 2**20


@dataclass(slots=True)
class Curve:
    """Resident MiB over rows done, and the most tasks seen."""

    points: list[tuple[int, float]] = field(default_factory=list)
    most_tasks: int = 0
    seconds: float = 0.0

    def note(self, rows: int) -> None:
        """On the event loop."""
        self.points.append((rows, resident_mib()))
        self.most_tasks = max(self.most_tasks, len(asyncio.all_tasks()))

    def peak(self, since: float, until: float) -> float:
        """Highest in a part of the rows, given as shares."""
        rows = self.points[-1][0]
        return max(mib for row, mib in self.points if since * rows <= row <= until * rows)


def ours(base_url: str, prompts: int, in_flight: int) -> Curve:
    """`harvester run` in this process: prompts file, gate, limiter, ledger, store, sealing along."""
    curve = Curve()
    with tempfile.TemporaryDirectory(prefix="run-") as name:
        folder = Path(name)
        with (folder / "p.jsonl").open("w", encoding="utf-8") as out:
            for prompt in itertools.islice(questions(), prompts):
                out.write(json.dumps({"messages": prompt.messages}) + "\n")
        path = folder / "harvest.toml"
        path.write_text(TOML.format(base_url=base_url, in_flight=in_flight), encoding="utf-8")
        begun = time.monotonic()
        summary = asyncio.run(job.run(prepare(path), lambda shot: curve.note(shot["answers_stored"])))
        curve.seconds = time.monotonic() - begun
        assert (summary.exit_code, summary.counts.answers_stored) == (0, prompts), summary
    return curve


def task_per_row(base_url: str, prompts: int, in_flight: int) -> Curve:
    """What most tools do: all tasks at once, a semaphore in front of the client, all answers in a list."""
    return asyncio.run(_task_per_row(f"{base_url}/chat/completions", prompts, in_flight))


async def _task_per_row(url: str, prompts: int, in_flight: int) -> Curve:
    curve, done, begun = Curve(), 0, time.monotonic()
    turn = asyncio.Semaphore(in_flight)
    async with bare_httpx() as client:

        async def send(body: bytes) -> bytes:
            nonlocal done
            async with turn:
                content = (await client.post(url, content=body, headers=HEADERS)).content
            done += 1
            return content

        async def watch() -> None:
            while True:
                curve.note(done)
                await asyncio.sleep(0.2)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(send(body) for body in itertools.islice(bodies(), prompts)))
        watching.cancel()
        curve.note(done)
    curve.seconds = time.monotonic() - begun
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--own-server", action="store_true", help="do not use nginx")
    chosen = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    fewer = chosen.prompts // BARE_SHARE
    with load_side(own=chosen.own_server) as load, fresh.Pool(1, maxtasksperchild=1) as pool:
        bare = pool.apply(task_per_row, (load.base_url, fewer, chosen.in_flight))
        curve = pool.apply(ours, (load.base_url, chosen.prompts, chosen.in_flight))
    print(f"{load.kind}, {chosen.in_flight} in flight")
    grown = bare.points[-1][1] - bare.points[0][1]
    print(
        f"  bare loop, {fewer:,} rows: {bare.most_tasks:,} tasks at most, grew by {grown:.0f} MiB: "
        f"{grown * BARE_SHARE:.0f} MiB for {chosen.prompts:,}"
    )
    quarters = [curve.peak(place / 4, (place + 1) / 4) for place in range(4)]
    peaks = " ".join(f"{mib:.1f}" for mib in quarters)
    print(
        f"  harvest, {chosen.prompts:,} rows in {curve.seconds:.0f} s: {curve.most_tasks:,} tasks at most, "
        f"peak of each quarter {peaks} MiB, last over second {quarters[3] / quarters[1]:.3f}"
    )
    print("  to reach: last over second <= 1.05, tasks bounded by the window")


if __name__ == "__main__":
    main()

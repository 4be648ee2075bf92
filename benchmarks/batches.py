"""Measure what a harvest costs online, in batches, and in batches with a deadline that they miss for 30 %.

    python benchmarks/batches.py [--prompts 4000]

The mock teacher's batches take ten hours, answering evenly, on a clock that jumps: no hour is waited for. A
hybrid run cancels its batch after seven hours, keeps the 70 % that it answered, and asks the others one by
one. Prices are USD per million tokens, half in batches. What was billed, and which rows were billed twice, is
counted by the teacher's own ledger.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import BatchSettings, MockSettings
from harvester.run import job
from harvester.run.prepare import prepare
from harvester.store.reader import Corpus

HOUR = 3600.0
LATENCY_H, DEADLINE_H = 10, 7
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.price]
input = 2.0
output = 4.0
batch_input = 1.0
batch_output = 2.0
[sampling]
max_tokens = 64
[prompts]
files = ["prompts.jsonl"]
[run]
transport = "{transport}"
[batch]
patience = "{deadline}h"
"""


class JumpingClock:
    """A clock whose waits are over at once; the teacher's batch clock jumps with it."""

    def __init__(self, mock: RunningMock) -> None:
        self._mock = mock
        self.passed_s = 0.0

    def now(self) -> float:
        """Seconds; they never go back."""
        return time.time() + self.passed_s

    def wall(self) -> float:
        """Unix seconds."""
        return time.time() + self.passed_s

    async def sleep(self, seconds: float) -> None:
        """Let that time pass."""
        await self.wait(asyncio.Event(), seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> None:
        """Wait a moment for the event, then let the time pass."""
        try:
            async with asyncio.timeout(0.02):
                await event.wait()
        except TimeoutError:
            self.passed_s += seconds
            await asyncio.to_thread(self._mock.advance, seconds)


def harvest(transport: str, prompts: int) -> None:
    """Run one harvest and print its figures."""
    settings = MockSettings(batches=BatchSettings(latency_s=LATENCY_H * HOUR))
    with start_in_thread(settings) as mock, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(prompts)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = folder / "harvest.toml"
        path.write_text(
            CONFIG.format(base_url=mock.base_url, transport=transport, deadline=DEADLINE_H), encoding="utf-8"
        )
        clock, began = JumpingClock(mock), time.monotonic()
        summary = asyncio.run(job.run(prepare(path), lambda _: None, batch_clock=clock))
        took_s, totals = time.monotonic() - began, mock.totals()
        samples = list(Corpus.open(folder / "store").samples(("key", "cost_microusd")))
        answered = sum(batch["request_counts"]["completed"] for batch in mock.batches()["batches"])
        usd = sum(sample.cost_microusd for sample in samples) / 1e6
        print(
            f"{transport:7} {summary.ending}: {len(samples):,} rows, {answered:,} from batches, "
            f"{totals['total_tokens']:,} tokens billed, ${usd:.4f}, "
            f"{totals['requests'] - totals['bodies']} keys paid twice, "
            f"{(clock.passed_s + took_s) / HOUR:.2f} h to complete ({took_s:.0f} s here)"
        )


def main() -> None:
    """Run the three transports."""
    flags = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    flags.add_argument("--prompts", type=int, default=4000)
    prompts = flags.parse_args().prompts
    for transport in ("online", "batch", "hybrid"):
        harvest(transport, prompts)


if __name__ == "__main__":
    main()

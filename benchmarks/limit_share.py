"""Share of a teacher's limit that a harvest uses, and the share of its sends that are refused.

    python benchmarks/limit_share.py [--seconds 60] [--case configured|too_high|hidden|halved]

The teacher is the mock in a process of its own: 200 requests/s, 0.2 s latency, continuous buckets that hold
one second's worth. Prints answers per second over the limit (first second left out), 429s over sends.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.config import HarvestConfig
from harvester.group_commit import GroupCommit
from harvester.harvest import PassLimits, Snapshot, harvest
from harvester.journal import Journal
from harvester.journey import Prompt
from harvester.mock_teacher.running import RunningMock, start_process
from harvester.plan import requests
from harvester.records import RunRecord

RATE = 200
LATENCY_S = 0.2


@dataclass(frozen=True, slots=True)
class Case:
    """What the harvester is told, whether the mock hides its limits, when the limit changes."""

    rpm: int | None
    hide: bool = False
    changes: tuple[tuple[float, int], ...] = ()  # share of the run, requests per minute


CASES = {
    "configured": Case(RATE * 60),
    "too_high": Case(RATE * 60 * 5),
    "too_high_hidden": Case(RATE * 60 * 5, hide=True),
    "unknown": Case(None),
    "hidden": Case(None, hide=True),
    "halved": Case(None, hide=True, changes=((1 / 3, RATE * 30), (2 / 3, RATE * 60))),
    "halved_told": Case(None, changes=((1 / 3, RATE * 30), (2 / 3, RATE * 60))),
}


def prompts() -> Iterator[Prompt]:
    for n in itertools.count():
        yield Prompt(f"p{n}", ({"role": "user", "content": f"What is {n} + {7 * n}?"},))


def measure(case: Case, seconds: float) -> tuple[list[tuple[float, Snapshot]], dict[str, Any]]:
    flags = ["--rpm", str(RATE * 60), "--latency", str(LATENCY_S), *(["--hide-limits"] if case.hide else [])]
    with start_process(*flags) as mock, tempfile.TemporaryDirectory() as folder:
        limits: dict[str, Any] = {"max_concurrency": 512}
        if case.rpm is not None:
            limits["requests_per_minute"] = case.rpm
        config = HarvestConfig.model_validate(
            {
                "teacher": {"base_url": mock.base_url, "model": "mock-teacher", "limits": limits},
                "prompts": {"files": ["p"]},
                "sampling": {"max_tokens": 64},
            }
        )
        seen: list[tuple[float, Snapshot]] = []
        writer = GroupCommit(Journal.open(Path(folder)))
        try:
            writer.call(lambda j: j.begin_run(RunRecord("r", time.time(), config.teacher.identity))).result()
            asyncio.run(_run(config, case, mock, writer, seen, seconds))
        finally:
            writer.close()
        return seen, mock.state()


async def _run(
    config: HarvestConfig,
    case: Case,
    mock: RunningMock,
    writer: GroupCommit,
    seen: list[tuple[float, Snapshot]],
    seconds: float,
) -> None:
    async def change() -> None:
        at = 0.0
        for share, rpm in case.changes:
            await asyncio.sleep(share * seconds - at)
            at = share * seconds
            await asyncio.to_thread(mock.set_limits, rpm=rpm)

    changing = asyncio.create_task(change())
    await harvest(
        requests(prompts(), config), config, key=None, writer=writer, run_id="r",
        limits=PassLimits(runtime_s=seconds, grace_s=5), stop=asyncio.Event(),
        on_progress=lambda shot: seen.append((time.monotonic(), shot)),
    )  # fmt: skip
    changing.cancel()


def rates(seen: list[tuple[float, Snapshot]], step_s: float = 2.0) -> list[float]:
    """Answers per second in each step."""
    found, (begun, last) = [], seen[0]
    for at, shot in seen:
        if at - begun >= step_s:
            found.append((shot.answers_stored - last.answers_stored) / (at - begun))
            begun, last = at, shot
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", choices=CASES, action="append")
    chosen = parser.parse_args()
    for name in chosen.case or CASES:
        seen, state = measure(CASES[name], chosen.seconds)
        begun = seen[0][0]
        body = [(at, shot) for at, shot in seen if 1 <= at - begun <= chosen.seconds]
        (first_at, first), (last_at, last) = body[0], body[-1]
        answers = (last.answers_stored - first.answers_stored) / (last_at - first_at)
        refused = state["statuses"].get("429", 0) / max(1, state["received"])
        print(f"{name:16} share of limit {answers / RATE:.3f}   refused {refused:.2%}", flush=True)
        if CASES[name].changes:
            print("   answers/s every 2 s:", *(f"{rate:.0f}" for rate in rates(seen)))


if __name__ == "__main__":
    main()

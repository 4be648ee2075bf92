"""Run one pass of the harvester with everything on, for the benchmarks: keys, limits, budget, store.

Limits and budget are too high to take effect: their cost is measured.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import orjson
from load_side import MODEL

from harvester.api.request_builder import requests
from harvester.api.types import Prompt
from harvester.config.config import HarvestConfig
from harvester.observe.counters import PassLimits, Snapshot
from harvester.run.background.canary_store import CanaryStore
from harvester.run.one_pass import make_pass
from harvester.run.pass_parts import PassSetup
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import RunRecord

Shots = list[tuple[float, Snapshot]]
"""Monotonic seconds and the counts then."""
WIDE_LIMITS = {"requests_per_minute": 6_000_000, "tokens_per_minute": 6_000_000_000}


def questions() -> Iterator[Prompt]:
    """Prompts without end, each different."""
    for n in itertools.count():
        yield Prompt(f"p{n}", ({"role": "user", "content": f"What is {n} + {7 * n}?"},))


def bodies() -> Iterator[bytes]:
    """The same questions as bare bodies: no plan, no key."""
    for prompt in questions():
        yield orjson.dumps({"messages": prompt.messages, "model": MODEL, "max_tokens": 64})


def configured(base_url: str, limits: dict[str, Any], **tables: Any) -> HarvestConfig:
    """A configuration for one teacher under these limits; more tables by name, `price` for the teacher's."""
    teacher: dict[str, Any] = {"base_url": base_url, "model": MODEL, "limits": limits}
    if "price" in tables:
        teacher["price"] = tables.pop("price")
    return HarvestConfig.model_validate(
        {"teacher": teacher, "prompts": {"files": ["p"]}, "sampling": {"max_tokens": 64}} | tables
    )


def everything_on(base_url: str, in_flight: int) -> HarvestConfig:
    """All laws at work, none of them binding, so many requests in flight at most."""
    return configured(
        base_url,
        WIDE_LIMITS | {"max_concurrency": in_flight},
        price={"input": 0.15, "output": 0.6, "as_of": "2026-11-01"},
        budget={"usd": 1e6, "tokens": 10**13},
    )


async def one_pass(
    config: HarvestConfig,
    seconds: float,
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
    *,
    rows: int | None = None,
    look: Callable[[Path], None] = lambda _: None,
) -> Shots:
    """Harvest for so long into a store of its own; the counts five times a second.

    Args:
        meanwhile: starts with the pass and is cancelled at its end.
        rows: ask so many, not without end.
        look: is shown the store before it is removed.
    """
    shots: Shots = []
    aside = asyncio.create_task(meanwhile()) if meanwhile else None
    with tempfile.TemporaryDirectory(prefix="store-") as folder:
        writer = GroupCommit(Journal.open(Path(folder)))
        try:
            run = RunRecord("r", time.time(), config.teacher.teacher_id)
            await asyncio.wrap_future(writer.call(lambda journal: journal.begin_run(run)))
            await make_pass(
                requests(itertools.islice(questions(), rows), config),
                PassSetup(
                    config=config,
                    key=None,
                    writer=writer,
                    run_id="r",
                    limits=PassLimits(runtime_s=seconds, grace_s=5),
                    stop=asyncio.Event(),
                    canaries=CanaryStore(Path(folder), run, run.purpose, print),
                    complain=print,
                ),
                on_progress=lambda shot: shots.append((time.monotonic(), shot)),
            )
        finally:
            await asyncio.to_thread(writer.close)
            if aside:
                aside.cancel()
        look(Path(folder))
    return shots

"""Journal -> shards on the writer thread: along a living run, at its end, and by `harvester seal`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

from harvester import compaction, doors, shards
from harvester.corpus import Corpus
from harvester.group_commit import GroupCommit
from harvester.journal import Journal
from harvester.lock import StoreLock

T = TypeVar("T")
SEAL_EVERY_S = 5.0


async def on_writer(writer: GroupCommit, fn: Callable[[Journal], T]) -> T:
    """Run something on the writer thread and wait for it."""
    return await asyncio.wrap_future(writer.call(fn))


async def seal_along(store: Path, writer: GroupCommit, target_bytes: int) -> None:
    """Seal what fills a shard while the harvest goes on: a slice, then whatever was submitted meanwhile."""
    while True:
        await asyncio.sleep(SEAL_EVERY_S)
        steps = await on_writer(
            writer, lambda j: shards.seal_steps(j, store, target_bytes=target_bytes, everything=False)
        )
        await _in_slices(writer, steps)


async def _in_slices(writer: GroupCommit, steps: Generator[None, None, T]) -> T:
    """What a generator returns, its steps run on the writer thread; cut short, it is closed there."""
    try:
        while not (ended := await on_writer(writer, lambda _: _step(steps))):
            pass
        return ended[0]
    finally:
        writer.call(lambda _: steps.close())


def _step(steps: Generator[None, None, T]) -> tuple[T] | tuple[()]:
    """One step; what the generator returned once it has, for StopIteration can't cross a future."""
    try:
        next(steps)
    except StopIteration as end:
        return (end.value,)
    return ()


async def seal_all(store: Path, writer: GroupCommit, target_bytes: int) -> int:
    """Seal everything and merge small shards; returns the rows sealed."""
    steps = await on_writer(
        writer, lambda j: shards.seal_steps(j, store, target_bytes=target_bytes, everything=True)
    )
    sealed = await _in_slices(writer, steps)
    merging = await on_writer(writer, lambda j: compaction.compact_steps(j, store, target_bytes=target_bytes))
    await _in_slices(writer, merging)
    return sealed.rows


def seal_now(store: Path) -> shards.SealResult:
    """`harvester seal`: everything journalled becomes Parquet, without a run."""
    doors.ask(Corpus.open(store).lineages(), "seal", store.resolve().parent)
    with StoreLock(store, started_at=time.time()):
        journal = Journal.open(store)
        try:
            return shards.seal(journal, store, target_bytes=64 * 1024 * 1024, everything=True)
        finally:
            journal.close()

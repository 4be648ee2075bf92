"""Journal -> shards on the writer thread: along a living run, at its end, and by `harvester seal`.

Small shards are merged only while nobody reads the folder: a reader that had listed it before would look
for files that are gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Generator
from itertools import count
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from harvester.store import paths, terms_check
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.reader import Corpus
from harvester.store.shards import compact, seal
from harvester.store.shards.rewrite import READY
from harvester.store.shards.swap import ReaderWatch

T = TypeVar("T")
SEAL_EVERY_S = 5.0
FULL_CHECK_TURNS = 24
GROWTH_CHECK_FACTOR = 0.9
"""Answers also fill pages that were in use already."""
QUIET_S = 3.0
"""A folder that nobody touched for so long has no reader between listing it and opening its files."""
QUIET_TRIES = 5
"""How often a merged file waits for such a time before it is given up."""


async def on_writer(writer: GroupCommit, fn: Callable[[Journal], T]) -> T:
    """Run something on the writer thread and wait for it."""
    return await asyncio.wrap_future(writer.call(fn))


async def seal_periodically(store: Path, writer: GroupCommit, target_bytes: int) -> None:
    """Seal what fills a shard and merge small ones: a slice, then whatever was submitted meanwhile."""
    due_bytes = 0.0
    for turn in count():
        await asyncio.sleep(SEAL_EVERY_S)
        # Summing up what is unsealed reads all of it: not before there can be enough, but now and then, for
        # what else the journal holds may shrink meanwhile.
        if turn % FULL_CHECK_TURNS == 0 or await on_writer(writer, seal.used_bytes) >= due_bytes:
            steps = await on_writer(
                writer, lambda j: seal.seal_steps(j, store, target_bytes=target_bytes, everything=False)
            )
            sealed = await _in_slices(writer, steps)
            due_bytes = await on_writer(writer, seal.used_bytes) + sealed.lacking_bytes * GROWTH_CHECK_FACTOR
        await merge(store, writer, target_bytes, patience=QUIET_TRIES)


async def merge(store: Path, writer: GroupCommit, target_bytes: int, *, patience: int) -> None:
    """Merge small shards, if there are enough of them and nobody reads the folder.

    Raises:
        StoreError: the disk refuses; the small ones stay.
    """
    if not await on_writer(writer, lambda j: compact.mergeable_batches(j, target_bytes)):
        return
    with contextlib.closing(ReaderWatch(store / paths.SHARDS)) as watch:
        steps = await on_writer(
            writer,
            lambda j: compact.compact_steps(j, store, target_bytes=target_bytes, is_quiet=watch.is_quiet),
        )
        await _in_slices(writer, steps, lambda: _wait_for_quiet(watch, patience))


async def _wait_for_quiet(watch: ReaderWatch, patience: int) -> None:
    watch.renew()
    for _ in range(patience):
        await asyncio.sleep(QUIET_S)
        if watch.is_quiet():
            return


async def _in_slices(
    writer: GroupCommit,
    steps: Generator[str | None, None, T],
    ready: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """What a generator returns, its steps run on the writer thread; cut short, it is closed there."""
    try:
        while True:
            step, *ended = await on_writer(writer, lambda _: _step(steps))
            if ended:
                return ended[0]
            if step is READY and ready is not None:
                await ready()
    finally:
        writer.call(lambda _: _let_go(steps))


def _step(steps: Generator[str | None, None, T]) -> tuple[str | None] | tuple[None, T]:
    """One step; also what the generator returned once it has, for StopIteration can't cross a future."""
    try:
        return (next(steps),)
    except StopIteration as end:
        return None, end.value


def _let_go(steps: Generator[str | None, None, T]) -> None:
    """Close it where it ran. Its memory goes back to the system, not into the holes of the allocator."""
    steps.close()
    pa.default_memory_pool().release_unused()


async def seal_all(store: Path, writer: GroupCommit, target_bytes: int) -> int:
    """Seal everything and merge small shards; returns the rows sealed."""
    steps = await on_writer(
        writer, lambda j: seal.seal_steps(j, store, target_bytes=target_bytes, everything=True)
    )
    sealed = await _in_slices(writer, steps)
    await merge(store, writer, target_bytes, patience=1)
    return sealed.rows


def seal_now(store: Path) -> seal.SealResult:
    """`harvester seal`: everything journalled becomes Parquet, without a run.

    Raises:
        TermsRefused: exit 77, and every answer stays journalled.
        StoreError: no journal here, or the disk refuses; StoreLocked, StoreCorrupt by cause.
    """
    Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
    terms_check.require_permitted(Corpus.open(store), "seal", store.resolve().parent)
    with StoreLock(store, started_at=time.time()), Journal.open(store) as journal:
        return seal.seal(journal, store, target_bytes=64 * 1024 * 1024, everything=True)

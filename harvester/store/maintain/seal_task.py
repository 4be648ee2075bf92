"""Seal on the writer thread during a run and at its end, and for `harvester seal`.

Small shards are merged only while no process reads the folder: a reader that has listed it would miss files.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Generator
from itertools import count
from pathlib import Path
from typing import TypeVar

import orjson
import pyarrow as pa

from harvester.store import paths, terms_check
from harvester.store.journal.group_commit import GroupCommit, on_writer
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.maintain.seal_hold import SealHold
from harvester.store.reader import Corpus
from harvester.store.shards import compact, seal
from harvester.store.shards.ready_rows import ReadyRows
from harvester.store.shards.rewrite import READY
from harvester.store.shards.swap import ReaderWatch

T = TypeVar("T")
# Size of a shard where the journal has no run, as the default of `[store] shard_mib`.
DEFAULT_SHARD_MIB = 64
SEAL_EVERY_S = 5.0
# How often answers are converted to columns, and how many slices at once while there are requests to send, if
# the process uses less than this share of a processor: a run that is busy would be slowed down.
CONVERT_EVERY_S = 0.25
SLICES_AT_ONCE = 4
BUSY_SHARE = 0.6
# Number of checks after which unsealed answers are summed up exactly, whatever the file's growth suggests.
FULL_CHECK_TURNS = 24
# Look again at 90 % of the missing bytes: new answers also reuse free SQLite pages, so file growth
# underestimates.
GROWTH_CHECK_FACTOR = 0.9
# A folder without access for this long has no reader between listing it and opening its files.
QUIET_S = 3.0
# How many times as long a merge waits for such a quiet time before it is given up.
QUIET_TRIES = 5
# How often it looks whether somebody read meanwhile, in one quiet time.
LOOKS = 8


async def convert_periodically(
    writer: GroupCommit, hold: SealHold, ready: ReadyRows, all_taken: asyncio.Event
) -> None:
    """Convert answers to columns, so that the last sealing is short.

    While there are requests to send, only where the process has time for it; all that there are while the
    last answers are waited for.
    """
    used_s, at = time.process_time(), time.monotonic()
    while True:
        if all_taken.is_set():
            await asyncio.sleep(CONVERT_EVERY_S)
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(all_taken.wait(), CONVERT_EVERY_S)
        used_before_s, before = used_s, at
        used_s, at = time.process_time(), time.monotonic()
        is_busy = used_s - used_before_s > BUSY_SHARE * (at - before)
        if is_busy and not all_taken.is_set():
            continue
        async with hold.lock:
            for done in count(1):
                is_more = await on_writer(writer, ready.step)
                if not is_more or (done >= SLICES_AT_ONCE and not all_taken.is_set()):
                    break


async def seal_periodically(
    store: Path,
    writer: GroupCommit,
    target_bytes: int,
    hold: SealHold | None = None,
    ready: ReadyRows | None = None,
) -> None:
    """Seal full shards and merge small ones, in slices between which submitted records are written."""
    hold = hold or SealHold()
    due_bytes = 0.0
    for turn in count():
        await asyncio.sleep(SEAL_EVERY_S)
        async with hold.lock:
            # Summing up what is unsealed reads all of it: not before there can be enough, but now and then,
            # for what else the journal holds may shrink meanwhile.
            if turn % FULL_CHECK_TURNS == 0 or await on_writer(writer, seal.used_bytes) >= due_bytes:
                sealed = await _seal(store, writer, target_bytes, hold, ready, everything=False)
                used = await on_writer(writer, seal.used_bytes)
                due_bytes = used + sealed.lacking_bytes * GROWTH_CHECK_FACTOR
            await merge(store, writer, target_bytes, tries=QUIET_TRIES)


async def _seal(
    store: Path,
    writer: GroupCommit,
    target_bytes: int,
    hold: SealHold,
    ready: ReadyRows | None,
    *,
    everything: bool,
) -> seal.SealResult:
    before = hold.before
    steps = await on_writer(
        writer,
        lambda j: seal.seal_steps(
            j, store, target_bytes=target_bytes, everything=everything, before=before, ready=ready
        ),
    )
    return await _in_slices(writer, steps)


async def merge(store: Path, writer: GroupCommit, target_bytes: int, *, tries: int) -> None:
    """Merge small shards, if there are enough of them and no process reads the folder.

    Raises:
        StoreError: the disk refuses; the small ones stay.
    """
    if not await on_writer(writer, lambda j: compact.mergeable_batches(j, target_bytes)):
        return
    with contextlib.closing(ReaderWatch(store / paths.SHARDS, QUIET_S)) as readers:
        steps = await on_writer(
            writer,
            lambda j: compact.compact_steps(j, store, target_bytes=target_bytes, readers=readers),
        )
        await _in_slices(writer, steps, lambda: _wait_for_quiet(readers, tries))


async def _wait_for_quiet(readers: ReaderWatch, tries: int) -> None:
    readers.renew()
    for _ in range(tries * LOOKS + 1):
        if readers.is_quiet():
            return
        await asyncio.sleep(QUIET_S / LOOKS)


async def _in_slices(
    writer: GroupCommit,
    steps: Generator[str | None, None, T],
    ready: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Run a generator on the writer thread and return its result; when cancelled, close it there."""
    try:
        while True:
            step, *ended = await on_writer(writer, lambda _: _step(steps))
            if ended:
                return ended[0]
            if step is READY and ready is not None:
                await ready()
    finally:
        writer.call(lambda _: _close(steps))


def _step(steps: Generator[str | None, None, T]) -> tuple[str | None] | tuple[None, T]:
    """Run one step; at the end return the generator's result too, as StopIteration can't pass a future."""
    try:
        return (next(steps),)
    except StopIteration as end:
        return None, end.value


def _close(steps: Generator[str | None, None, T]) -> None:
    """Close the generator on its thread and return its memory to the system."""
    steps.close()
    pa.default_memory_pool().release_unused()


async def seal_all(
    store: Path,
    writer: GroupCommit,
    target_bytes: int,
    hold: SealHold | None = None,
    ready: ReadyRows | None = None,
) -> int:
    """Seal everything that is not held, and merge small shards; return the number of rows sealed."""
    sealed = await _seal(store, writer, target_bytes, hold or SealHold(), ready, everything=True)
    await merge(store, writer, target_bytes, tries=1)
    return sealed.rows


def seal_now(store: Path) -> seal.SealResult:
    """Seal all answers of the journal without a run (`harvester seal`).

    Raises:
        TermsRefused: exit 77, and every answer stays journalled.
        StoreError: no store here, or the disk refuses; StoreLocked, StoreCorrupt by cause.
    """
    Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
    terms_check.require_permitted(Corpus.open(store), "seal", store.resolve().parent)
    with StoreLock(store, started_at=time.time()), Journal.open(store) as journal:
        return seal.seal(journal, store, target_bytes=last_target_bytes(journal), everything=True)


def last_target_bytes(journal: Journal) -> int:
    """Return the shard size in bytes that the configuration of the store's last run set."""
    with journal.reading() as connection:
        row = connection.execute("SELECT config_json FROM runs ORDER BY run DESC LIMIT 1").fetchone()
    config = {} if row is None else orjson.loads(row[0])
    return int(config.get("store", {}).get("shard_mib", DEFAULT_SHARD_MIB) * 1024 * 1024)

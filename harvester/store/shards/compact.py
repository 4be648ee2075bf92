"""Small shards -> shards of the target size, beside a living harvest, while nobody reads the folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from harvester.errors import ShardsInUse
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.shards import swap
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.parquet_file import ROWS_PER_SHARD
from harvester.store.shards.rewrite import finish_interrupted_rewrite, rewrite

SMALL_FACTOR = 2
"""A shard below the target by this factor, in bytes and in rows, is worth merging."""
MIN_SMALL_SHARDS = 4
"""So many small ones are merged even where they don't fill a shard: fewer would be written over and over."""


def compact_steps(
    journal: Journal, store: Path, *, target_bytes: int, is_quiet: Callable[[], bool] = lambda: True
) -> Generator[str | None, None, int]:
    """Merge small neighbours of one lineage digest into shards of about `target_bytes`, in slices.

    Each `next` runs one slice on the thread that owns the journal, and nothing else may seal or merge in
    between. Returns the files merged away.

    Args:
        is_quiet: asked at the last moment before each exchange; False leaves the small shards for later.

    Raises:
        StoreError, StoreFull, StoreCorrupt: the old files stay in the manifest.
    """
    merged = 0
    finish_interrupted_rewrite(journal, store)
    for batch in mergeable_batches(journal, target_bytes):
        try:
            yield from rewrite(journal, store, batch, hold=lambda: _alone(store, is_quiet))
        except ShardsInUse:
            break
        merged += len(batch)
    return merged


def mergeable_batches(journal: Journal, target_bytes: int) -> list[list[ShardEntry]]:
    """Small shards that are worth merging, each list into one."""
    by_digest: dict[str, list[ShardEntry]] = {}
    for entry in read_manifest(journal):
        if entry.size_bytes < target_bytes / SMALL_FACTOR and entry.rows < ROWS_PER_SHARD / SMALL_FACTOR:
            by_digest.setdefault(entry.lineage_digest, []).append(entry)
    found: list[list[ShardEntry]] = []
    for _, entries in sorted(by_digest.items()):
        batch: list[ShardEntry] = []
        for entry in entries:
            if sum(one.rows for one in batch) + entry.rows > ROWS_PER_SHARD:
                found.append(batch)
                batch = []
            batch.append(entry)
            if sum(one.size_bytes for one in batch) >= target_bytes:
                found.append(batch)
                batch = []
        if len(batch) >= MIN_SMALL_SHARDS:
            found.append(batch)
    return [batch for batch in found if len(batch) > 1]


@contextlib.contextmanager
def _alone(store: Path, is_quiet: Callable[[], bool]) -> Iterator[bool]:
    if not is_quiet():  # asked first: looking whether we are alone opens the folder too
        yield False
        return
    with swap.if_no_reader(store / paths.SHARDS) as is_free:
        yield is_free

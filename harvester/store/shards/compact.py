"""Merge small shards into shards of the target size, also during a run, while no process reads the folder."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

from harvester.errors import ShardsInUse
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.parquet_file import ROWS_PER_SHARD
from harvester.store.shards.rewrite import finish_interrupted_rewrite, rewrite
from harvester.store.shards.swap import ReaderWatch

# A shard smaller than the target by this factor, in bytes and in rows, is merged.
SMALL_FACTOR = 2
# Small shards that don't fill a new one are merged only when there are this many: else the same rows would be
# rewritten over and over.
MIN_SMALL_SHARDS = 4


def compact_steps(
    journal: Journal, store: Path, *, target_bytes: int, readers: ReaderWatch | None = None
) -> Generator[str | None, None, int]:
    """Merge small neighbours of one lineage digest into shards of about `target_bytes`, in slices.

    Each `next` runs one slice on the thread that owns the journal; no other sealing or merge may run in
    between. Returns the number of files merged.

    Args:
        readers: watches the folder; unless it is quiet the small shards stay as they are.

    Raises:
        StoreError, StoreFull, StoreCorrupt: the old files stay in the manifest.
    """
    merged = 0
    finish_interrupted_rewrite(journal, store)
    for batch in mergeable_batches(journal, target_bytes):
        try:
            yield from rewrite(journal, store, batch, patience_s=0.0, readers=readers)
        except ShardsInUse:
            break
        merged += len(batch)
    return merged


def mergeable_batches(journal: Journal, target_bytes: int) -> list[list[ShardEntry]]:
    """Return lists of small shards; each list is to be merged into one shard."""
    by_digest: dict[str, list[ShardEntry]] = {}
    for entry in read_manifest(journal):
        if entry.size_bytes < target_bytes / SMALL_FACTOR and entry.rows < ROWS_PER_SHARD / SMALL_FACTOR:
            by_digest.setdefault(entry.lineage_digest, []).append(entry)
    groups: list[list[ShardEntry]] = []
    for _, entries in sorted(by_digest.items()):
        batch: list[ShardEntry] = []
        for entry in entries:
            if sum(shard.rows for shard in batch) + entry.rows > ROWS_PER_SHARD:
                groups.append(batch)
                batch = []
            batch.append(entry)
            if sum(shard.size_bytes for shard in batch) >= target_bytes:
                groups.append(batch)
                batch = []
        if len(batch) >= MIN_SMALL_SHARDS:
            groups.append(batch)
    return [batch for batch in groups if len(batch) > 1]

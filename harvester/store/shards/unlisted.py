"""Find shard files that are missing from the manifest because the process died between rename and commit.

Such a file has the number of the next shard. The next process adopts it if its rows match the journal. Any
other file with a number that high is foreign, or the journal is older than its shards; then nothing may be
sealed until the file is gone.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from harvester.errors import StoreCorrupt, StoreError
from harvester.store.journal.checksums import COVERED, is_unchanged
from harvester.store.journal.records import ShardEntry
from harvester.store.shards.parquet_file import (
    SHARD_NAME,
    former_keys_of,
    keys_in_index,
    keys_of,
    lineage_digest,
    lineages_in,
    open_shard,
)
from harvester.store.shards.swap import locate
from harvester.system.files import sha256_of

# What reading a file that is no shard, or a damaged one, may raise.
_UNREADABLE = (StoreError, pa.ArrowException, ValueError, KeyError, IndexError, AttributeError, TypeError)


@dataclass(frozen=True, slots=True)
class ShardContents:
    """An undamaged shard file: number, name, keys and former keys in order, lineage digest, hash and size."""

    shard: int
    name: str
    keys: tuple[bytes, ...]
    former_keys: tuple[bytes, ...]
    lineage: str
    sha256: str
    size_bytes: int

    def keys_before(self, known: Collection[bytes]) -> list[bytes]:
        """Return the keys that an index with the keys `known` lists the rows under."""
        return keys_in_index(self.keys, self.former_keys, known)

    def entry(self, sealed_at: float) -> ShardEntry:
        """Make the manifest entry of the file."""
        return ShardEntry(
            self.shard, self.name, self.sha256, len(self.keys), self.size_bytes, self.lineage, sealed_at
        )


def read_contents(path: Path) -> ShardContents | None:
    """Read a shard file; None where its name does not contain its hash or its columns are foreign.

    Raises:
        OSError: the disk refuses.
    """
    match = SHARD_NAME.match(path.name)
    if match is None or not path.is_file():
        return None
    digest = sha256_of(path)
    if digest[:16] != match[2]:
        return None
    try:
        with open_shard(path) as file:
            keys, former_keys = tuple(keys_of(file)), tuple(former_keys_of(file))
            lineage, size = lineage_digest(lineages_in(file)[0]), path.stat().st_size
            return ShardContents(int(match[1]), path.name, keys, former_keys, lineage, digest, size)
    except _UNREADABLE:
        return None


def unlisted_files(folder: Path, last: int) -> list[tuple[int, Path]]:
    """Return numbers and paths of the files numbered higher than the last shard, sorted."""
    matched = ((SHARD_NAME.match(path.name), path) for path in folder.glob("part-*"))
    numbered = ((int(match[1]), path) for match, path in matched if match is not None)
    return sorted((number, path) for number, path in numbered if number > last)


def require_none(folder: Path, last: int) -> None:
    """Do nothing when no file has a number higher than the last shard's.

    Raises:
        StoreCorrupt: names the first that has one.
    """
    for _, path in unlisted_files(folder, last):
        raise StoreCorrupt(
            f"no manifest row names it, and the last shard has number {last}",
            place=str(path),
            remedy="was an older journal.db put back? then put the newest back; else"
            " `harvester verify PATH --repair` moves the file away",
        )


def is_half_sealed(connection: sqlite3.Connection, path: Path) -> bool:
    """Return whether every row of a file is an undamaged answer that is still in the journal."""
    columns, short = COVERED["answers"]
    query = f"SELECT {', '.join(columns)}, checksum FROM answers WHERE key = ?"  # noqa: S608 - our own names
    raw_at = columns.index("raw")
    with open_shard(path) as file:
        for batch in file.iter_batches(batch_size=256, columns=["key", "raw"]):
            for row in batch.to_pylist():
                stored = connection.execute(query, (bytes.fromhex(row["key"]),)).fetchone()
                if (
                    stored is None
                    or stored[raw_at] != row["raw"]
                    or not is_unchanged(stored[:-1], short, stored[-1])
                ):
                    return False
    return True


def is_half_merged(
    connection: sqlite3.Connection, folder: Path, held: ShardContents, named: Collection[tuple[int, str]]
) -> bool:
    """Return whether all rows belong to shards of the manifest (`named`) that are in the staged folder."""
    known: set[bytes] = set()
    for shard, name in named:
        if locate(folder, name).parent != folder:
            query = "SELECT key FROM keys WHERE shard = ?"
            known |= {key for (key,) in connection.execute(query, (shard,))}
    return bool(known) and known.issuperset(held.keys_before(known))

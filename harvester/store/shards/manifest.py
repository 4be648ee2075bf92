"""The manifest and the key index: which shards are sealed, and which of them holds a key.

What takes a transaction's connection writes inside that transaction, a few hundred keys at a time: a shard
has a hundred thousand.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

from harvester.store import paths
from harvester.store.journal.checksums import checksum, damaged_row_error, is_unchanged, set_meta
from harvester.store.journal.journal import KEYS_PER_LOOKUP, Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import micros

CHUNKS_PER_STEP = 16


def read_manifest(journal: Journal) -> list[ShardEntry]:
    """The sealed shards, in the order they were sealed."""
    with journal.reading() as connection:
        return manifest_rows(connection)


def manifest_rows(connection: sqlite3.Connection) -> list[ShardEntry]:
    """The same, as a connection sees it: inside a transaction, of its instant."""
    query = (
        "SELECT shard, name, sha256, rows, size_bytes, lineage_digest, sealed_us FROM manifest ORDER BY shard"
    )
    return [
        ShardEntry(shard, name, sha256, rows, size, lineage, sealed_us / 1e6)
        for shard, name, sha256, rows, size, lineage, sealed_us in connection.execute(query)
    ]


def indexed_keys(journal: Journal, entry: ShardEntry) -> set[bytes]:
    """Keys that the index places in a shard."""
    with journal.reading() as connection:
        return {key for (key,) in connection.execute("SELECT key FROM keys WHERE shard = ?", (entry.shard,))}


def insert_entry(connection: sqlite3.Connection, entry: ShardEntry) -> None:
    """Name a shard in the manifest."""
    facts = (
        entry.shard,
        entry.name,
        entry.sha256,
        entry.rows,
        entry.size_bytes,
        entry.lineage_digest,
        micros(entry.sealed_at),
    )
    connection.execute("INSERT INTO manifest VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*facts, checksum(facts)))


def insert_new_entry(connection: sqlite3.Connection, entry: ShardEntry) -> None:
    """The same for a shard that was just made: its number is never given again."""
    insert_entry(connection, entry)
    set_meta(connection, "last_shard", entry.shard)


def move_answers(connection: sqlite3.Connection, shard: int, keys: Sequence[bytes]) -> None:
    """Journalled answers lie in this shard from now on: into the index, their bodies out of the journal.

    Who calls it has held each row against its checksum, when it was read to be written into the shard or to
    be compared with it: reading the bodies again would make a living harvest wait.
    """
    for holes, chunk in _chunks(keys):
        query = f"SELECT key, outcome, max_tokens, asker FROM answers WHERE key IN ({holes}) ORDER BY key"  # noqa: S608
        rows = connection.execute(query, chunk).fetchall()
        connection.executemany(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)",
            [(row[0], shard, *row[1:], _check(shard, *row)) for row in rows],
        )
        connection.execute(f"DELETE FROM answers WHERE key IN ({holes})", chunk)  # noqa: S608


def move_keys(connection: sqlite3.Connection, shard: int, keys: Sequence[bytes]) -> None:
    """Sealed keys lie in this shard from now on.

    Raises:
        StoreCorrupt: an index row is not what was written.
    """
    for holes, chunk in _chunks(keys):
        connection.executemany(
            "UPDATE keys SET shard = ?, checksum = ? WHERE key = ?",
            [(shard, _check(shard, *row), row[0]) for row in _whole(connection, holes, chunk)],
        )


def require_index(journal: Journal, keys: Sequence[bytes]) -> Iterator[None]:
    """Look at the index rows of sealed keys, some thousands a step, before they are moved.

    Raises:
        StoreCorrupt: one is not what was written; names its key.
    """
    for number, (holes, chunk) in enumerate(_chunks(keys)):
        with journal.reading() as connection:
            _whole(connection, holes, chunk)
        if number % CHUNKS_PER_STEP == CHUNKS_PER_STEP - 1:
            yield


def _whole(
    connection: sqlite3.Connection, holes: str, keys: Sequence[bytes]
) -> list[tuple[bytes, int, int | None, bytes]]:
    """Key, outcome, ceiling and asker of these index rows, each as it was written."""
    query = (
        f"SELECT key, outcome, max_tokens, asker, shard, checksum FROM keys WHERE key IN ({holes})"  # noqa: S608
        " ORDER BY key"
    )
    rows = connection.execute(query, keys).fetchall()
    for key, outcome, most_tokens, asker, shard, check in rows:
        if not is_unchanged((shard, outcome, most_tokens, key, asker), 3, check):
            raise damaged_row_error("keys", key.hex(), Path(paths.JOURNAL))
    return [row[:4] for row in rows]


def _chunks(keys: Sequence[bytes]) -> Iterator[tuple[str, Sequence[bytes]]]:
    """Placeholders and keys, in order of the index: neighbours share a page of it."""
    ordered = sorted(keys)
    for start in range(0, len(ordered), KEYS_PER_LOOKUP):
        chunk = ordered[start : start + KEYS_PER_LOOKUP]
        yield ",".join("?" * len(chunk)), chunk


def _check(shard: int, key: bytes, outcome: int, most_tokens: int | None, asker: bytes) -> int:
    return checksum([shard, outcome, most_tokens], key, asker)

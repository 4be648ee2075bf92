"""Read and write the manifest (the list of sealed shards) and the key index (which shard holds a key).

Functions that take a connection write inside its open transaction, some hundred keys at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from harvester.errors import StoreCorrupt
from harvester.store import paths
from harvester.store.journal.checksums import (
    COVERED,
    checksum,
    damaged_row_error,
    is_unchanged,
    printable,
    select_with_checksum,
    set_meta,
)
from harvester.store.journal.journal import KEYS_PER_LOOKUP, Journal
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import micros

CHUNKS_PER_STEP = 16
# An asker that is no prompt: the next run records its prompt as one that shares the answer.
UNKNOWN_ASKER = bytes(8)


def read_manifest(journal: Journal) -> list[ShardEntry]:
    """Return the sealed shards in the order they were sealed."""
    with journal.reading() as connection:
        return manifest_rows(connection)


def manifest_rows(connection: sqlite3.Connection, *, checked: bool = True) -> list[ShardEntry]:
    """Return the sealed shards as a connection sees them, inside a transaction as of its snapshot.

    Args:
        checked: False for `verify`, which reports damaged rows itself.

    Raises:
        StoreCorrupt: a row is damaged, or names a file outside the folder.
    """
    query = f"{select_with_checksum('manifest')} ORDER BY shard"
    entries = []
    for *values, check in connection.execute(query):
        if checked and not is_unchanged(values, len(values), check):
            raise damaged_row_error("manifest", str(values[0]), Path(paths.JOURNAL))
        shard, name, sha256, rows, size, lineage, sealed_us = values
        if "/" in str(name):
            raise StoreCorrupt(f"the manifest names a file elsewhere: {name!r}", place=paths.JOURNAL)
        entries.append(ShardEntry(shard, name, sha256, rows, size, lineage, sealed_us / 1e6))
    return entries


def indexed_keys(journal: Journal, entry: ShardEntry) -> set[bytes]:
    """Return the keys that the index lists for a shard."""
    with journal.reading() as connection:
        return {key for (key,) in connection.execute("SELECT key FROM keys WHERE shard = ?", (entry.shard,))}


def insert_entry(connection: sqlite3.Connection, entry: ShardEntry) -> None:
    """Insert a shard into the manifest."""
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
    """Insert a new shard into the manifest and record its number as used."""
    insert_entry(connection, entry)
    set_meta(connection, "last_shard", entry.shard)


def move_answers(connection: sqlite3.Connection, shard: int, keys: Sequence[bytes]) -> None:
    """Insert answers of the journal into the key index under this shard and delete their bodies.

    The caller has checked the checksum of each row when it read it for the shard: reading the bodies again
    would delay a run.
    """
    for holes, chunk in _chunks(keys):
        query = f"SELECT key, outcome, max_tokens, asker FROM answers WHERE key IN ({holes}) ORDER BY key"  # noqa: S608
        rows = connection.execute(query, chunk).fetchall()
        connection.executemany(
            "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?)",
            [(row[0], shard, *row[1:], _check(shard, *row)) for row in rows],
        )
        connection.execute(f"DELETE FROM answers WHERE key IN ({holes})", chunk)  # noqa: S608


def insert_keys(
    connection: sqlite3.Connection, shard: int, rows: Sequence[tuple[bytes, int, int | None, bytes]]
) -> None:
    """Insert index rows of a shard: key, outcome, max_tokens and asker of each."""
    connection.executemany(
        "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)",
        [(row[0], shard, *row[1:], _check(shard, *row)) for row in sorted(rows)],
    )


def insert_missing_keys(
    connection: sqlite3.Connection, shard: int, rows: Iterable[tuple[bytes, int, int | None, bytes]]
) -> None:
    """Insert those of a shard's index rows whose key neither the index nor the journal has."""
    connection.executemany(
        "INSERT OR IGNORE INTO keys SELECT ?1, ?2, ?3, ?4, ?5, ?6"
        " WHERE NOT EXISTS (SELECT 1 FROM answers WHERE key = ?1)",
        ((row[0], shard, *row[1:], _check(shard, *row)) for row in rows),
    )


def move_keys(connection: sqlite3.Connection, shard: int, keys: Sequence[bytes]) -> None:
    """Point the index rows of sealed keys to another shard.

    Raises:
        StoreCorrupt: an index row is damaged.
    """
    for holes, chunk in _chunks(keys):
        connection.executemany(
            "UPDATE keys SET shard = ?, checksum = ? WHERE key = ?",
            [(shard, _check(shard, *row), row[0]) for row in _checked(connection, holes, chunk)],
        )


def rename_keys(connection: sqlite3.Connection, new_keys: Mapping[bytes, bytes]) -> None:
    """Give answers other keys, in the index and in what refers to them.

    A dead letter under a new key is removed: its request is answered.

    Raises:
        StoreCorrupt: a row is damaged.
    """
    for holes, chunk in _chunks(list(new_keys)):
        for table in ("keys", "asks", "intents", "failures"):
            rename_rows(connection, table, {key: new_keys[key] for key in chunk}, holes)
        connection.executemany("DELETE FROM dead WHERE key = ?", [(new_keys[key],) for key in chunk])


def rename_rows(
    connection: sqlite3.Connection, table: str, new_keys: Mapping[bytes, bytes], holes: str = ""
) -> None:
    """Give the rows of one table other keys.

    Args:
        holes: SQL placeholders, one for each key; made here where there are few keys.

    Raises:
        StoreCorrupt: a row is damaged.
    """
    columns, short = COVERED[table]
    at = columns.index("key")
    holes = holes or ",".join("?" * len(new_keys))
    query = f"{select_with_checksum(table)} WHERE key IN ({holes})"
    changes = []
    for *values, check in connection.execute(query, sorted(new_keys)).fetchall():
        if not is_unchanged(values, short, check):
            raise damaged_row_error(table, values[at].hex(), Path(paths.JOURNAL))
        old, values[at] = values[at], new_keys[values[at]]
        long = [value.encode() if isinstance(value, str) else value for value in values[short:]]
        changes.append((values[at], checksum(values[:short], *long), old, check))
    connection.executemany(
        f"UPDATE {table} SET key = ?, checksum = ? WHERE key = ? AND checksum = ?",  # noqa: S608
        changes,
    )


def require_index(journal: Journal, keys: Sequence[bytes]) -> Iterator[None]:
    """Check the index rows of sealed keys before they are moved, some thousands in a step.

    Raises:
        StoreCorrupt: one is damaged; names its key.
    """
    for number, (holes, chunk) in enumerate(_chunks(keys)):
        with journal.reading() as connection:
            _checked(connection, holes, chunk)
        if number % CHUNKS_PER_STEP == CHUNKS_PER_STEP - 1:
            yield


def index_rows(connection: sqlite3.Connection, shard: int) -> list[tuple[bytes, int, int | None, bytes]]:
    """Return key, outcome, max_tokens and asker of the index rows of a shard, after a check of each.

    Raises:
        StoreCorrupt: one is damaged; names its key.
    """
    query = "SELECT key, outcome, max_tokens, asker, checksum FROM keys WHERE shard = ?"
    rows = connection.execute(query, (shard,)).fetchall()
    for key, outcome, most_tokens, asker, check in rows:
        if not is_unchanged((shard, outcome, most_tokens, key, asker), 3, check):
            raise damaged_row_error("keys", printable(key), Path(paths.JOURNAL))
    return [row[:4] for row in rows]


def _checked(
    connection: sqlite3.Connection, holes: str, keys: Sequence[bytes]
) -> list[tuple[bytes, int, int | None, bytes]]:
    """Return key, outcome, max_tokens and asker of these index rows after a check of their checksums."""
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
    """Yield SQL placeholders and keys, sorted because neighbours share a page of the index."""
    ordered = sorted(keys)
    for start in range(0, len(ordered), KEYS_PER_LOOKUP):
        chunk = ordered[start : start + KEYS_PER_LOOKUP]
        yield ",".join("?" * len(chunk)), chunk


def _check(shard: int, key: bytes, outcome: int, most_tokens: int | None, asker: bytes) -> int:
    return checksum([shard, outcome, most_tokens], key, asker)

"""Describe one snapshot of a corpus, so that what was made of it can be named and found again."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from harvester.store.journal.records import ShardEntry as ShardEntry
from harvester.store.shards.schema import Sample

# What the unsealed answers, and the prompts that share an answer, are known by.
_TAIL_STATE = (
    "SELECT id, checksum, '' FROM answers UNION ALL"
    " SELECT 0, 0, lineage_json FROM runs WHERE run IN (SELECT run FROM answers) ORDER BY 1, 3"
)
_ASKS_STATE = "SELECT id, checksum, '' FROM asks ORDER BY id"


class CorpusView(NamedTuple):
    """One snapshot of a corpus.

    Attributes:
        manifest: the sealed files.
        tail_sha256: of what the unsealed answers are known by; "" without any.
        asks_sha256: of what the prompts that share an answer are known by; "" without any.
        unsealed_rows: unsealed answers; prompts that share one are not counted.
        unsealed: the unsealed answers, once for each prompt that asked for them.
    """

    manifest: tuple[ShardEntry, ...]
    tail_sha256: str
    asks_sha256: str
    unsealed_rows: int
    unsealed: Iterator[Sample]


def tail_sha256(connection: sqlite3.Connection) -> str:
    """Return the SHA-256 of what the unsealed answers are known by; "" without any."""
    return _digest(connection, _TAIL_STATE)


def asks_sha256_of(connection: sqlite3.Connection) -> str:
    """Return the SHA-256 of what the prompts that share an answer are known by; "" without any."""
    return _digest(connection, _ASKS_STATE)


def _digest(connection: sqlite3.Connection, query: str) -> str:
    """Return the SHA-256 of a query's rows; "" without rows."""
    digest, count = hashlib.sha256(), 0
    for row in connection.execute(query):
        digest.update(repr(tuple(row)).encode())
        count += 1
    return digest.hexdigest() if count else ""

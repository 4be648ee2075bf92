"""Read and write named JSON values in the table `meta`, whose checksum moves with each write."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any

import orjson

from harvester.store.journal.checksums import updating_checksum


def read_value(connection: sqlite3.Connection, name: str) -> Any:
    """Return the value of a name, None where there is none."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else orjson.loads(row[0])


def write_values(connection: sqlite3.Connection, values: Mapping[str, Any]) -> None:
    """Write values by name, over those that are there, inside an open transaction."""
    rows = [(name, orjson.dumps(value).decode()) for name, value in values.items()]
    with updating_checksum(connection, "meta"):
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

"""Rebuild a journal whose pages are damaged: copy every row that can still be read into a new one.

SQLite reads a table up to a damaged page. So each table is read from its first row and from its last one;
what lies between two damaged pages is lost. Row checksums are checked afterwards, as in any other journal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from harvester.errors import StoreError
from harvester.store import paths
from harvester.store.journal import sqlite
from harvester.store.journal.checksums import COVERED, matches_checksum
from harvester.store.maintain import quarantine
from harvester.store.maintain.repair_rows import recompute_meta

_OTHERS = ("counters", "meta", "checks")
# Columns in whose order a table is stored.
_ORDER = {
    "counters": ("run", "name"),
    "meta": ("name",),
    "checks": ("name",),
    "keys": ("key",),
    "dead": ("key",),
    "finished": ("digest",),
}


def rebuild_if_damaged(store: Path) -> tuple[str, ...]:
    """Rebuild the journal if SQLite finds its structure damaged; the old one is moved to quarantine.

    Returns:
        The name in quarantine; nothing where the journal is sound.

    Raises:
        StoreCorrupt: its first page is damaged, so that nothing can be read; StoreError: the disk refuses.
    """
    path = store / paths.JOURNAL
    if not path.exists() or not path.stat().st_size:
        return ()
    with closing(sqlite.open_for_reading(store)) as connection:
        if _is_sound(connection):
            return ()
        with suppress(StoreError):
            sqlite.empty_log(store)
        name = quarantine.move_in(store, path, keep=True)
        sqlite.create(store, lambda new: _copy_rows(connection, new))
    return (name,)


def _is_sound(connection: sqlite3.Connection) -> bool:
    try:
        return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError:
        return False


def _copy_rows(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    for statement in (sqlite.FINISHED, "DELETE FROM counters"):
        new.execute(statement)
    if sqlite.has_table(old, "batches"):
        new.execute(sqlite.BATCHES)
        new.execute(sqlite.BATCH_ROWS)
    for table in (*COVERED, *_OTHERS):
        if not sqlite.has_table(old, table):
            continue
        for row in _readable_rows(old, table):
            holes = ",".join("?" * len(row))
            # What the checksum does not confirm is repaired, or deleted, once all is copied.
            kept = "REPLACE" if table == "meta" else "IGNORE"
            with suppress(UnicodeEncodeError):  # no text any more
                new.execute(f"INSERT OR {kept} INTO {table} VALUES ({holes})", row)  # noqa: S608
    stored = new.execute("SELECT checksum FROM checks WHERE name = 'meta'").fetchone()
    if stored is None or not matches_checksum(new, "meta", stored[0]):
        recompute_meta(new)


def _readable_rows(connection: sqlite3.Connection, table: str) -> Iterator[tuple[object, ...]]:
    """Yield the rows up to a damaged page, and those after it; rows may come twice."""
    columns = _ORDER.get(table, ("rowid",))
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    for direction in ("ASC", "DESC"):
        order = ", ".join(f"{column} {direction}" for column in columns)
        query = f"SELECT * FROM {table} NOT INDEXED ORDER BY {order}"  # noqa: S608 - our own names
        try:
            yield from connection.execute(query)
        except sqlite3.DatabaseError:
            continue
        return

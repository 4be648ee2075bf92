"""Repair damaged rows of the journal, in one transaction.

A row of which one bit changed is put back (`journal.bit_repair`). Of the others those are deleted whose
content is asked for again, or can be found elsewhere; what is lost with each is said. Sums that nothing
proves stay as they are, and `verify` goes on to name them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from harvester.errors import StoreError
from harvester.store import paths
from harvester.store.journal import sqlite
from harvester.store.journal.bit_repair import mended_row
from harvester.store.journal.checksums import (
    COVERED,
    checksum,
    is_unchanged,
    matches_checksum,
    row_name,
    write_checksum,
)
from harvester.store.journal.journal import Journal
from harvester.store.journal.rows import forget_finished, micros
from harvester.store.shards.manifest import manifest_rows
from harvester.store.shards.parquet_file import lineages_in
from harvester.store.shards.proved import open_entry
from harvester.terms.lineage import Lineage

# Ending of a run whose row was damaged.
UNKNOWN_ENDING = "unknown"
# What is lost with a row of a table that is deleted.
_LOST_WITH = {
    "dead": "a failed row is asked again",
    "asks": "a further prompt that shares an answer is noted again by the next run that reads it",
    "failures": "the bytes of a failed attempt are no longer shown",
    "intents": "an attempt that was possibly billed is no longer listed",
    "batches": "its rows are asked again, although the provider may bill the batch",
    "batch_rows": "its row is asked again, although the provider may bill the batch",
}
_WITHOUT_ROWID = frozenset({"keys", "dead", "finished"})


@dataclass(frozen=True, slots=True)
class RowRepair:
    """What was done with damaged rows.

    Attributes:
        mended: rows that were put back as they were written.
        lost: keys of deleted answers and dead letters, which the next run asks again.
        unindexed: keys of deleted index rows, which may still be found in a shard.
        notes: what else is lost, one line for each row.
    """

    mended: int = 0
    lost: frozenset[bytes] = frozenset()
    unindexed: frozenset[bytes] = frozenset()
    notes: tuple[str, ...] = ()

    def with_others(self, others: Iterable[RowRepair]) -> RowRepair:
        """Return the sum of several repairs."""
        everything = (self, *others)
        return RowRepair(
            sum(each.mended for each in everything),
            frozenset().union(*(each.lost for each in everything)),
            frozenset().union(*(each.unindexed for each in everything)),
            tuple(note for each in everything for note in each.notes),
        )


@dataclass(frozen=True, slots=True)
class _DamagedRow:
    """A row that does not match its checksum: rowid or primary key, values as in `COVERED`, checksum."""

    identity: Any
    values: list[Any]
    check: Any


def repair_rows(journal: Journal, store: Path) -> RowRepair:
    """Put damaged rows back or delete them.

    Raises:
        StoreError: the disk refuses.
    """
    sealed = _sealed_lineages(journal, store)
    done = RowRepair()
    with journal.writing() as connection:
        before = connection.text_factory
        connection.text_factory = _tolerant  # a flipped bit may leave bytes that are no text
        try:
            for table in COVERED:
                if sqlite.has_table(connection, table):
                    done = done.with_others(_repair_table(connection, table, sealed))
        finally:
            connection.text_factory = before
        done = done.with_others([*_repair_sums(connection), *_delete_orphans(connection)])
        if done != RowRepair():
            forget_finished(connection)
    return done


def _tolerant(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _repair_table(
    connection: sqlite3.Connection, table: str, sealed: Mapping[str, Lineage]
) -> Iterator[RowRepair]:
    for row in list(_damaged_rows(connection, table)):
        mended = mended_row(row.values, COVERED[table][1], row.check)
        if mended is None and table == "runs":
            yield _repair_run(connection, row, sealed)
        elif mended is None:
            yield _delete(connection, table, row)
        else:
            _replace(connection, table, row, *mended)
            yield RowRepair(mended=1)


def _damaged_rows(connection: sqlite3.Connection, table: str) -> Iterator[_DamagedRow]:
    columns, short = COVERED[table]
    identity = _identity_of(table)
    query = f"SELECT {identity}, {', '.join(columns)}, checksum FROM {table}"  # noqa: S608 - our own names
    for key, *values, check in connection.execute(query):
        if not is_unchanged(values, short, check):
            yield _DamagedRow(key, values, check)


def _identity_of(table: str) -> str:
    if table not in _WITHOUT_ROWID:
        return "rowid"
    return "digest" if table == "finished" else "key"


def _replace(
    connection: sqlite3.Connection, table: str, row: _DamagedRow, values: Sequence[Any], check: int
) -> None:
    """Write the values of a row that was mended. If there is such a row already, the damaged one goes."""
    columns, identity = COVERED[table][0], _identity_of(table)
    assigned = ", ".join(f"{name} = ?" for name in (*columns, "checksum"))
    query = f"UPDATE OR IGNORE {table} SET {assigned} WHERE {identity} = ?"  # noqa: S608 - our own names
    written = connection.execute(query, (*values, check, row.identity)).rowcount
    if not written:
        connection.execute(f"DELETE FROM {table} WHERE {identity} = ?", (row.identity,))  # noqa: S608


def _delete(connection: sqlite3.Connection, table: str, row: _DamagedRow) -> RowRepair:
    connection.execute(
        f"DELETE FROM {table} WHERE {_identity_of(table)} = ?",  # noqa: S608 - our own names
        (row.identity,),
    )
    columns = COVERED[table][0]
    key = row.values[columns.index("key")] if "key" in columns else None
    keys = frozenset({key} if isinstance(key, bytes) else set[bytes]())
    if table == "keys":
        return RowRepair(unindexed=keys)
    notes = (f"{table} {row_name(table, row.values)}: {_LOST_WITH[table]}",) if table in _LOST_WITH else ()
    return RowRepair(lost=keys if table in {"answers", "dead"} else frozenset(), notes=notes)


def _repair_run(connection: sqlite3.Connection, row: _DamagedRow, sealed: Mapping[str, Lineage]) -> RowRepair:
    """Restore the row of a run from the lineage that its shards hold; without one delete it.

    Unsealed answers of a run whose lineage nothing proves can't be sealed: nobody knows under which terms
    they were given. They are asked again.
    """
    number, run_id = row.values[0], str(row.values[1])
    values = dict(zip(COVERED["runs"][0], row.values, strict=True))
    lineage = sealed.get(run_id)
    if lineage is not None:
        exact = {**values, "lineage_json": lineage.to_json().decode()}
        if is_unchanged(list(exact.values()), COVERED["runs"][1], row.check):
            _replace(connection, "runs", row, list(exact.values()), row.check)
            return RowRepair(mended=1)
        started_us = micros(datetime.fromisoformat(str(lineage.stored["started_at"])).timestamp())
        known = {"started_us": started_us, "ended_us": None, "ending": UNKNOWN_ENDING, "exit_code": None}
        restored = list({**exact, **known, "config_json": "{}"}.values())
        texts = [text.encode() for text in restored[COVERED["runs"][1] :]]
        _replace(connection, "runs", row, restored, checksum(restored[: COVERED["runs"][1]], *texts))
        return RowRepair(notes=(f"run {run_id}: its configuration and its ending are no longer known",))
    keys = {key for (key,) in connection.execute("SELECT key FROM answers WHERE run = ?", (row.identity,))}
    connection.execute("DELETE FROM answers WHERE run = ?", (row.identity,))
    connection.execute("DELETE FROM runs WHERE rowid = ?", (row.identity,))
    note = f"run {number}: nothing proves its terms, so its {len(keys)} unsealed answers are asked again"
    return RowRepair(lost=frozenset(keys), notes=(note,))


def _delete_orphans(connection: sqlite3.Connection) -> Iterator[RowRepair]:
    """Delete unsealed answers whose run is gone with a damaged page: they can't be sealed."""
    where = "WHERE run NOT IN (SELECT run FROM runs)"
    keys = {key for (key,) in connection.execute(f"SELECT key FROM answers {where}")}  # noqa: S608
    if keys:
        connection.execute(f"DELETE FROM answers {where}")  # noqa: S608
        note = f"{len(keys)} unsealed answers belong to runs that are no longer known: they are asked again"
        yield RowRepair(lost=frozenset(keys), notes=(note,))
    if sqlite.has_table(connection, "batch_rows"):
        where = "WHERE batch NOT IN (SELECT batch FROM batches)"
        strays = connection.execute(f"DELETE FROM batch_rows {where}").rowcount  # noqa: S608
        if strays:
            yield RowRepair(notes=(f"{strays} rows belong to batches that are no longer known: asked again",))


def _sealed_lineages(journal: Journal, store: Path) -> dict[str, Lineage]:
    """Return the lineages in shards that are as they were sealed, by run."""
    lineages: dict[str, Lineage] = {}
    with journal.reading() as connection:
        entries = manifest_rows(connection, checked=False)
    for entry in entries:
        try:
            with open_entry(store / paths.SHARDS, entry) as file:
                lineages |= {lineage.run_id: lineage for lineage in lineages_in(file)}
        except StoreError:
            continue
    return lineages


def _repair_sums(connection: sqlite3.Connection) -> Iterator[RowRepair]:
    """Mend rows of `counters` and `meta` under their common checksums."""
    if not sqlite.has_table(connection, "checks"):
        return
    for name, check in connection.execute("SELECT name, checksum FROM checks").fetchall():
        if matches_checksum(connection, name, check):
            continue
        table, _, run = str(name).partition(":")
        where, bound = ("", ()) if table == "meta" else (" WHERE run = ?", (run,))
        table = "meta" if table == "meta" else "counters"
        query = f"SELECT name, value FROM {table}{where} ORDER BY name"  # noqa: S608 - our own names
        rows = connection.execute(query, bound).fetchall()
        mended = mended_row([value for row in rows for value in row], 2 * len(rows), check)
        if mended is not None:
            _rewrite_sum(connection, name, rows, *mended)
            yield RowRepair(mended=1)
        elif table == "meta":
            recompute_meta(connection)
            yield RowRepair(notes=("meta: the numbers of the last attempt and shard were found again",))
        elif not rows:  # of no run: the name of the checksum changed
            connection.execute("DELETE FROM checks WHERE name = ?", (name,))
            yield RowRepair(mended=1)


def _rewrite_sum(
    connection: sqlite3.Connection, name: str, rows: Sequence[Any], values: list[Any], check: int
) -> None:
    table, _, run = name.partition(":")
    pairs = list(zip(values[::2], values[1::2], strict=True))
    for before, after in zip(rows, pairs, strict=True):
        if tuple(before) != after and table == "meta":
            connection.execute("UPDATE meta SET name = ?, value = ? WHERE name = ?", (*after, before[0]))
        elif tuple(before) != after:
            query = "UPDATE counters SET name = ?, value = ? WHERE run = ? AND name = ?"
            connection.execute(query, (*after, int(run), before[0]))
    connection.execute("UPDATE checks SET checksum = ? WHERE name = ?", (check, name))


def recompute_meta(connection: sqlite3.Connection) -> None:
    """Recompute the numbers of `meta` from the other tables; readable pauses stay, other rows are deleted."""
    highest = {
        "last_shard": "SELECT coalesce(max(shard), 0) FROM"
        " (SELECT shard FROM manifest UNION SELECT shard FROM keys)",
        "last_attempt_id": "SELECT coalesce(max(attempt_id), 0) FROM"
        " (SELECT attempt_id FROM intents UNION SELECT attempt_id FROM failures)",
    }
    rows = [(name, str(connection.execute(query).fetchone()[0])) for name, query in highest.items()]
    connection.execute("DELETE FROM meta WHERE name NOT GLOB 'hold:*' OR NOT json_valid(value)")
    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    write_checksum(connection, "meta")

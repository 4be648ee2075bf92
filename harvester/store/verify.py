"""Verify a store: every byte of every shard, every row of the journal, and whether they agree."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import StoreError
from harvester.store import paths
from harvester.store.journal import checksums, sqlite, wal
from harvester.store.journal.ledger import count_missing
from harvester.store.journal.lock import is_written
from harvester.store.journal.records import ShardEntry
from harvester.store.shards import unlisted
from harvester.store.shards.parquet_file import open_shard
from harvester.store.shards.schema import ADDED_COLUMNS, SCHEMA, columns_with_nulls
from harvester.store.shards.swap import locate
from harvester.system.files import sha256_of


class FindingKind(StrEnum):
    """What is wrong with a file or a row. The values are part of the output of `verify --json`."""

    MISSING = "missing"
    FOREIGN = "foreign"
    TORN = "torn"
    CHANGED = "changed"
    DAMAGED = "damaged"
    DISAGREES = "disagrees"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault of a store: what kind, in which file or table, and the detail."""

    kind: FindingKind
    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.message}"


def verify_store(
    store: Path, folder: Path, manifest: Sequence[ShardEntry], *, has_journal: bool, alone: bool = False
) -> list[Finding]:
    """Return every fault of a store, or of a folder of shards. Reads all of it once, in slices.

    Args:
        alone: the caller holds LOCK, so no other process is sealing.
    """
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    findings = [finding for entry in manifest for finding in _shard(folder, entry)]
    if has_journal:
        findings += verify_journal(store)
        findings += _foreign(store, folder, present, alone=alone)
    elif has_lost_journal(store):
        findings.append(
            Finding(
                kind=FindingKind.MISSING,
                place=paths.JOURNAL,
                message="without it all of these answers are paid for again",
            )
        )
    return findings


def has_lost_journal(store: Path) -> bool:
    """Return whether a store lost its journal; a copy of `shards/` alone never had one."""
    present = {name for name in (paths.LOCK, paths.STATUS) if (store / name).exists()}
    return bool(present) and not (store / paths.JOURNAL).exists()


class NotReadableError(StoreError):
    """A file of a store may not be read by this user."""


def count_readable_rows(folder: Path) -> int:
    """Count the rows of the shards in a folder that can be opened, whatever a journal says of them."""
    rows = 0
    for path in sorted(folder.glob("*.parquet")):
        with contextlib.suppress(StoreError), open_shard(path) as file:
            rows += file.metadata.num_rows
    return rows


def verify_copy(folder: Path) -> list[Finding]:
    """Return the shards of a folder without journal that can't be opened."""
    findings: list[Finding] = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            with open_shard(path):
                pass
        except StoreError as error:
            findings.append(
                Finding(kind=FindingKind.DAMAGED, place=f"{folder.name}/{path.name}", message=error.message)
            )
    return findings


def require_readable(path: Path) -> None:
    """Do nothing if this user may read a file: what is hidden from one user is not damaged.

    Raises:
        NotReadableError: the user may not.
    """
    if not os.access(path, os.R_OK):
        raise NotReadableError(
            "can't be used: permission denied", place=str(path), remedy="check its owner and permissions"
        )


def _shard(folder: Path, entry: ShardEntry) -> Iterator[Finding]:
    path = locate(folder, entry.name)
    place = f"{folder.name}/{entry.name}"
    if not path.exists():
        yield Finding(kind=FindingKind.MISSING, place=place, message=f"{entry.rows} sealed answers are gone")
        return
    if not path.is_file():
        yield Finding(kind=FindingKind.FOREIGN, place=place, message="it is no regular file")
        return
    require_readable(path)
    try:
        size = path.stat().st_size
        if entry.sha256 and size != entry.size_bytes:
            yield Finding(
                kind=FindingKind.TORN, place=place, message=f"{size} bytes, {entry.size_bytes} were sealed"
            )
            return
        if entry.sha256 and sha256_of(path) != entry.sha256:
            yield Finding(
                kind=FindingKind.CHANGED, place=place, message="its bytes are not the bytes that were sealed"
            )
            return
        rows = 0
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            lacking = set(SCHEMA.names) - ADDED_COLUMNS - set(file.schema_arrow.names)
            if lacking:
                yield Finding(
                    kind=FindingKind.FOREIGN, place=place, message=f"lacks columns {sorted(lacking)}"
                )
                return
            yield from _columns(file.schema_arrow, place)
            empty = set[str]()
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                rows += table.num_rows
                empty.update(columns_with_nulls(table))
            if empty:
                message = f"rows without a value in {sorted(empty)}"
                yield Finding(kind=FindingKind.FOREIGN, place=place, message=message)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Finding(kind=FindingKind.DAMAGED, place=place, message=str(error))
        return
    if rows != entry.rows:
        yield Finding(
            kind=FindingKind.DISAGREES, place=place, message=f"{rows} rows, the manifest says {entry.rows}"
        )


def _columns(schema: pa.Schema, place: str) -> Iterator[Finding]:
    """Yield columns of another type, or that are there twice; in a file that no manifest names."""
    for name in SCHEMA.names:
        types = [field.type for field in schema if field.name == name]
        if len(types) > 1 or types[:1] not in ([], [SCHEMA.field(name).type]):
            given = ", ".join(map(str, types))
            message = f"column {name} has the type {given}, not {SCHEMA.field(name).type}"
            yield Finding(kind=FindingKind.FOREIGN, place=place, message=message)


def _foreign(store: Path, folder: Path, present: Sequence[str], *, alone: bool) -> Iterator[Finding]:
    """Yield files without a manifest row; `present` was listed first, as a new shard is a file first."""
    strays = sorted({name for name in present if not name.startswith(".")})
    last = -1
    with (
        contextlib.suppress(StoreError, ValueError),
        contextlib.closing(sqlite.open_for_reading(store)) as connection,
        sqlite.translate_errors(store / paths.JOURNAL),
        sqlite.snapshot(connection),
    ):
        named = connection.execute("SELECT shard, name FROM manifest").fetchall()
        strays = [name for name in strays if name not in {name_in_manifest for _, name_in_manifest in named}]
        last = checksums.meta_number(connection, "last_shard")
        strays = [name for name in strays if not _is_half_done(connection, folder / name, last, named)]
    is_sealing = not alone and is_written(store)
    for name in strays:
        if is_sealing and name.startswith(f"part-{last + 1:08d}-"):
            continue  # a process is sealing: between rename and commit a shard is not in the manifest
        yield Finding(
            kind=FindingKind.FOREIGN, place=f"{folder.name}/{name}", message="no manifest row names it"
        )


def _is_half_done(
    connection: sqlite3.Connection, path: Path, last: int, named: Sequence[tuple[int, str]]
) -> bool:
    """Return whether a process was killed between rename and commit, so that the next adopts the file."""
    if not path.name.startswith(f"part-{last + 1:08d}-"):
        return False
    held = unlisted.read_contents(path)
    return held is not None and (
        unlisted.is_half_sealed(connection, path)
        or unlisted.is_half_merged(connection, path.parent, held, named)
    )


def verify_journal(store: Path) -> list[Finding]:
    """Return the faults of journal.db, its key index and manifest included."""
    findings: list[Finding] = []
    # While a process writes, the log changes; that process checked it when it opened the journal.
    log = wal.log_path(store / paths.JOURNAL)
    try:
        lost = 0 if is_written(store) else wal.commits_lost(log)
    except OSError as error:
        return [Finding(kind=FindingKind.DAMAGED, place=log.name, message=error.strerror or str(error))]
    if lost:
        findings.append(
            Finding(
                kind=FindingKind.DAMAGED, place=log.name, message=f"{lost} commits lie behind a changed byte"
            )
        )
    try:
        with (
            contextlib.closing(sqlite.open_for_reading(store)) as connection,
            sqlite.translate_errors(store / paths.JOURNAL),
        ):
            for (text,) in connection.execute("PRAGMA integrity_check(20)"):
                if text != "ok":
                    findings.append(Finding(kind=FindingKind.DAMAGED, place=paths.JOURNAL, message=text))
            for table in checksums.COVERED:
                if table not in sqlite.OPTIONAL_TABLES or sqlite.has_table(connection, table):
                    findings += _rows(connection, table)
            findings += _index(connection)
            findings += _batches(connection)
            with sqlite.snapshot(connection):  # a run writes rows and their checksum together
                findings += _sums(connection)
                findings += _ledger(connection)
    except StoreError as error:
        findings.append(Finding(kind=FindingKind.DAMAGED, place=paths.JOURNAL, message=error.message))
    return findings


def _rows(connection: sqlite3.Connection, table: str) -> Iterator[Finding]:
    for values in checksums.changed_rows(connection, table):
        yield Finding(
            kind=FindingKind.CHANGED,
            place=f"{paths.JOURNAL} {table}",
            message=f"row {checksums.row_name(table, values)}",
        )


def _sums(connection: sqlite3.Connection) -> Iterator[Finding]:
    """Check `meta` and `counters` against their checksums, which a store of the first version lacks."""
    has_checks = sqlite.has_table(connection, "checks")
    for name, check in (
        connection.execute("SELECT name, checksum FROM checks").fetchall() if has_checks else ()
    ):
        if not checksums.matches_checksum(connection, name, check):
            yield Finding(
                kind=FindingKind.CHANGED,
                place=f"{paths.JOURNAL} {name}",
                message="its rows are not those that were written",
            )


def _ledger(connection: sqlite3.Connection) -> Iterator[Finding]:
    if missing := count_missing(connection):
        yield Finding(
            kind=FindingKind.MISSING,
            place=f"{paths.JOURNAL} counters",
            message=f"{missing} answers were paid that are neither stored nor purged",
        )


def _batches(connection: sqlite3.Connection) -> Iterator[Finding]:
    """Yield rows that wait in a batch that is not known or has ended, or that are answered already."""
    if not sqlite.has_table(connection, "batch_rows"):
        return
    queries = {
        "rows wait in a batch that is not known": "batch NOT IN (SELECT batch FROM batches)",
        "rows wait in a batch that has ended": "batch IN (SELECT batch FROM batches WHERE state = 'ended')",
        "rows wait in a batch although they are answered": "key IN (SELECT key FROM keys)"
        " OR key IN (SELECT key FROM answers)",
    }
    for message, where in queries.items():
        query = f"SELECT count(*) FROM batch_rows WHERE {where}"  # noqa: S608 - our own text
        if count := connection.execute(query).fetchone()[0]:
            place = f"{paths.JOURNAL} batch_rows"
            yield Finding(kind=FindingKind.DISAGREES, place=place, message=f"{count:,} {message}")


def _index(connection: sqlite3.Connection) -> Iterator[Finding]:
    query = (
        "SELECT name, rows, coalesce(found, 0) FROM manifest"
        " LEFT JOIN (SELECT shard, count(*) AS found FROM keys GROUP BY shard) USING (shard)"
        " WHERE rows <> coalesce(found, 0)"
    )
    for name, rows, indexed in connection.execute(query):
        yield Finding(
            kind=FindingKind.DISAGREES,
            place=f"{paths.SHARDS}/{name}",
            message=f"{rows} rows, {indexed} in the key index",
        )
    query = "SELECT shard, count(*) FROM keys WHERE shard NOT IN (SELECT shard FROM manifest) GROUP BY shard"
    for shard, lost in connection.execute(query):
        yield Finding(
            kind=FindingKind.MISSING,
            place=f"shard {shard}",
            message=f"{lost} keys point at a shard the manifest does not name",
        )

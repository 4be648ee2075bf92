"""What verification can see: every byte of every shard, every row of the journal, and where they disagree."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harvester import database
from harvester.database import checksum
from harvester.errors import StoreError
from harvester.exchange import find
from harvester.lock import is_held
from harvester.records import ShardEntry
from harvester.schema import ADDED, SCHEMA


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong. `kind` is missing, foreign, torn, changed, damaged or disagrees."""

    kind: str
    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.place}: {self.message}"


def look(store: Path, folder: Path, manifest: Sequence[ShardEntry], *, has_journal: bool) -> list[Finding]:
    """Everything wrong with a store, or with a bare folder of shards. Reads all of it once, in slices."""
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = [one for entry in manifest for one in _shard(folder, entry)]
    if has_journal:
        found += _journal(store)
        found += _foreign(store, folder.name, present)
    return found


def _shard(folder: Path, entry: ShardEntry) -> Iterator[Finding]:
    path = find(folder, entry.name)
    place = f"{folder.name}/{entry.name}"
    if not path.exists():
        yield Finding("missing", place, f"{entry.rows} sealed answers are gone")
        return
    try:
        size = path.stat().st_size
        if entry.sha256 and size != entry.size_bytes:
            yield Finding("torn", place, f"{size} bytes, {entry.size_bytes} were sealed")
            return
        if entry.sha256 and _sha256(path) != entry.sha256:
            yield Finding("changed", place, "its bytes are not the bytes that were sealed")
            return
        rows = 0
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            lacking = set(SCHEMA.names) - ADDED - set(file.schema_arrow.names)
            if lacking:
                yield Finding("foreign", place, f"lacks columns {sorted(lacking)}")
                return
            for number in range(file.num_row_groups):
                rows += file.read_row_group(number).num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Finding("damaged", place, str(error))
        return
    if rows != entry.rows:
        yield Finding("disagrees", place, f"{rows} rows, the manifest says {entry.rows}")


def _foreign(store: Path, folder: str, present: Sequence[str]) -> Iterator[Finding]:
    """Files no manifest row names; listed before the manifest was read, for a new shard is a file first."""
    strays = {name for name in present if not name.startswith(".")}
    number = ""
    with (
        contextlib.suppress(StoreError, ValueError),
        contextlib.closing(database.open_for_reading(store)) as connection,
        database.translated(store / database.NAME),
    ):
        strays -= {name for (name,) in connection.execute("SELECT name FROM manifest")}
        (last,) = connection.execute("SELECT value FROM meta WHERE name = 'last_shard'").fetchone()
        number = f"part-{int(last) + 1:08d}-"
    for name in sorted(strays):
        if name.startswith("part-") and is_held(store):
            continue  # a process is sealing: between rename and commit a shard is in no manifest
        if name.startswith(number) and _sha256(store / folder / name).startswith(name[14:30]):
            continue  # one was killed there: the next run takes the file over
        yield Finding("foreign", f"{folder}/{name}", "no manifest row names it")


def _journal(store: Path) -> list[Finding]:
    found: list[Finding] = []
    try:
        with (
            contextlib.closing(database.open_for_reading(store)) as connection,
            database.translated(store / database.NAME),
        ):
            for (text,) in connection.execute("PRAGMA integrity_check(20)"):
                if text != "ok":
                    found.append(Finding("damaged", database.NAME, text))
            for table, (columns, short) in _ROWS.items():
                if table != "finished" or database.has_table(connection, table):
                    found += _rows(connection, table, columns, short)
            found += _index(connection)
            found += _sums(connection)
    except StoreError as error:
        found.append(Finding("damaged", database.NAME, error.message))
    return found


# For every table: its columns, and how many of the first belong to the JSON part of the checksum.
_ROWS: dict[str, tuple[str, int]] = {
    "runs": ("run, run_id, started_us, ended_us, ending, exit_code, lineage_json, config_json", 6),
    "intents": (
        "attempt_id, run, at_us, reserved_tokens, reserved_microusd, code, endpoint, key", 7,
    ),
    "answers": (
        "run, outcome, max_tokens, status, sample_index, attempts, input_tokens, output_tokens,"
        " cost_microusd, latency_us, at_us, endpoint, key, asker, prompt_json, body_json, raw", 12,
    ),
    "keys": ("shard, outcome, max_tokens, key, asker", 3),
    "dead": (
        "run, max_tokens, sample_index, attempts, at_us, code, message, key, asker, prompt_json,"
        " body_json", 7,
    ),
    "asks": ("sample_index, key, asker, prompt_json", 1),
    "failures": ("attempt_id, run, status, maybe_billed, at_us, code, key, raw", 6),
    "manifest": ("shard, name, sha256, rows, size_bytes, lineage_digest, sealed_us", 7),
    "finished": ("rows, dead, input_tokens, digest", 3),
}  # fmt: skip


def _rows(connection: sqlite3.Connection, table: str, columns: str, short: int) -> Iterator[Finding]:
    for *values, check in connection.execute(f"SELECT {columns}, checksum FROM {table}"):  # noqa: S608
        long = [value.encode() if isinstance(value, str) else value for value in values[short:]]
        try:
            same = checksum(values[:short], *long) == check
        except TypeError:  # a flipped bit can turn a column into another type
            same = False
        if not same:
            yield Finding("changed", f"{database.NAME} {table}", f"row {_name(table, columns, values)}")


def _sums(connection: sqlite3.Connection) -> Iterator[Finding]:
    """`meta` and `counters` against their checksums; a store of the first days may have none."""
    (told,) = connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'checks'").fetchone()
    for name, check in connection.execute("SELECT name, checksum FROM checks").fetchall() if told else ():
        try:
            same = database.check_of(connection, name) == check
        except (TypeError, ValueError):  # a flipped bit in a name or a type
            same = False
        if not same:
            yield Finding("changed", f"{database.NAME} {name}", "its rows are not those that were written")


def _name(table: str, columns: str, values: Sequence[Any]) -> str:
    names = columns.split(", ")
    value = values[names.index("key")] if "key" in names else values[0]
    return value.hex() if isinstance(value, bytes) else str(value)


def _index(connection: sqlite3.Connection) -> Iterator[Finding]:
    query = (
        "SELECT name, rows, coalesce(found, 0) FROM manifest"
        " LEFT JOIN (SELECT shard, count(*) AS found FROM keys GROUP BY shard) USING (shard)"
        " WHERE rows <> coalesce(found, 0)"
    )
    for name, rows, indexed in connection.execute(query):
        yield Finding("disagrees", f"shards/{name}", f"{rows} rows, {indexed} in the key index")
    query = "SELECT shard, count(*) FROM keys WHERE shard NOT IN (SELECT shard FROM manifest) GROUP BY shard"
    for shard, lost in connection.execute(query):
        yield Finding("missing", f"shard {shard}", f"{lost} keys point at a shard the manifest does not name")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Compute and check row checksums of the journal (CRC-32).

Every row has one; the rows of `meta`, and of `counters` run by run, have one in common. Before a row is moved
or a table is changed its old checksum is checked: a new one over damaged values would hide the damage.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import StoreCorrupt
from harvester.store import paths
from harvester.system.path_names import error_of_path

# For every table: its columns, and how many of the first belong to the JSON part of the checksum.
COVERED: dict[str, tuple[tuple[str, ...], int]] = {
    table: (tuple(columns.split()), short)
    for table, columns, short in (
        ("runs", "run run_id started_us ended_us ending exit_code lineage_json config_json", 6),
        ("intents", "attempt_id run at_us reserved_tokens reserved_microusd code endpoint key", 7),
        (
            "answers",
            "run outcome max_tokens status sample_index attempts input_tokens output_tokens"
            " cost_microusd latency_us at_us endpoint key asker prompt_json body_json raw",
            12,
        ),
        ("keys", "shard outcome max_tokens key asker", 3),
        (
            "dead",
            "run max_tokens sample_index attempts at_us code message key asker prompt_json body_json",
            7,
        ),
        ("asks", "sample_index key asker prompt_json", 1),
        ("failures", "attempt_id run status maybe_billed at_us code key raw", 6),
        ("manifest", "shard name sha256 rows size_bytes lineage_digest sealed_us", 7),
        ("finished", "rows dead input_tokens digest", 3),
        (
            "batches",
            "batch run name state status at_us rows cancel file_id batch_id endpoint message",
            12,
        ),
        (
            "batch_rows",
            "batch attempt_id attempts sample_index input_tokens reserved_tokens reserved_microusd"
            " key prompt_json body_json",
            7,
        ),
    )
}


# What turning a stored row into values may raise.
_VALUE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def checksum(scalars: Sequence[int | str | None], *texts: bytes) -> int:
    """CRC-32 (IEEE) of a row: the JSON array of its short columns, then the bytes of the others."""
    crc = zlib.crc32(orjson.dumps(scalars))
    for text in texts:
        crc = zlib.crc32(text, crc)
    return crc


def is_unchanged(values: Sequence[Any], short: int, check: object) -> bool:
    """Return whether a row's values, in the order of `COVERED`, have this checksum."""
    try:
        long = [value.encode() if isinstance(value, str) else value for value in values[short:]]
        return checksum(values[:short], *long) == check
    except (TypeError, ValueError):  # a flipped bit can turn a column into another type, or into no text
        return False


def require_unchanged(table: str, rows: Iterable[Mapping[str, Any]], place: Path) -> None:
    """Do nothing when every row matches its checksum.

    Args:
        rows: mappings with at least the covered columns and `checksum`.

    Raises:
        StoreCorrupt: names the key of the first damaged row.
    """
    columns, short = COVERED[table]
    for row in rows:
        values = [row[name] for name in columns]
        if not is_unchanged(values, short, row["checksum"]):
            raise damaged_row_error(table, row_name(table, values), place)


def select_with_checksum(table: str) -> str:
    """Return the query for all covered columns and the checksum of a table."""
    return f"SELECT {', '.join(COVERED[table][0])}, checksum FROM {table}"  # noqa: S608 - our own names


def checked_rows(
    connection: sqlite3.Connection, table: str, place: Path, where: str = ""
) -> list[dict[str, Any]]:
    """Return rows of a table as mappings, after a check of each.

    Args:
        where: a condition in SQL, "" for all rows.

    Raises:
        StoreCorrupt: names the key of the first damaged row.
    """
    names = (*COVERED[table][0], "checksum")
    query = select_with_checksum(table) + (f" WHERE {where}" if where else "")
    rows = [dict(zip(names, values, strict=True)) for values in connection.execute(query)]
    require_unchanged(table, rows, place)
    return rows


def damaged_row_error(table: str, name: str, place: Path) -> StoreCorrupt:
    """Make the error for a damaged row."""
    return StoreCorrupt(
        f"the row of {table} for {name} does not match its checksum",
        place=str(place),
        remedy="`harvester verify PATH --repair` repairs it, if its content can be recovered",
    )


def changed_rows(connection: sqlite3.Connection, table: str) -> Iterator[list[Any]]:
    """Yield the values, in the order of `COVERED`, of each damaged row."""
    _, short = COVERED[table]
    for *values, check in connection.execute(select_with_checksum(table)):
        if not is_unchanged(values, short, check):
            yield values


def changed_index_keys(connection: sqlite3.Connection) -> Iterator[object]:
    """Yield the key of each damaged row of the key index, as `changed_rows` does, in under half of the time.

    The JSON part of the checksum is the same for most rows, so it is computed once for each kind.
    """
    crc32, prefixes = zlib.crc32, dict[tuple[object, object, object], int]()
    query = "SELECT shard, outcome, max_tokens, key, asker, checksum FROM keys"
    for shard, outcome, most_tokens, key, asker, check in connection.execute(query):
        kind = (shard, outcome, most_tokens)
        prefix = prefixes.get(kind)
        try:
            if prefix is None:
                prefix = prefixes[kind] = crc32(orjson.dumps(kind))
            if type(key) is not bytes or crc32(asker, crc32(key, prefix)) != check:
                yield key
        except TypeError:  # a flipped bit can turn a column into another type
            yield key


def row_name(table: str, values: Sequence[Any]) -> str:
    """Return the name of a row in messages: its key in hex where it has one, else its number."""
    columns, _ = COVERED[table]
    return printable(values[columns.index("key")] if "key" in columns else values[0])


def printable(value: object) -> str:
    """Return a key or number for messages: bytes in hex."""
    return value.hex() if isinstance(value, bytes) else str(value)


@contextmanager
def translate_value_errors(place: Path) -> Iterator[None]:
    """Translate errors of turning stored rows into values to `StoreCorrupt`.

    A checksum proves that a row is as it was written, not that the harvester wrote it.
    """
    try:
        yield
    except _VALUE_ERRORS as error:
        if isinstance(error, UnicodeError) and (wrong_name := error_of_path(error)):
            raise wrong_name from error
        raise StoreCorrupt(
            f"a row can't be understood: {type(error).__name__}: {str(error)[:200]}",
            place=str(place),
            remedy="`harvester verify PATH` names damaged rows; restore journal.db from a copy",
        ) from error


@contextmanager
def updating_checksum(connection: sqlite3.Connection, name: str) -> Iterator[None]:
    """Check the rows of `meta` or `counters:RUN`, change them in the block, then renew their checksum.

    Call it inside an open transaction.

    Raises:
        StoreCorrupt: the rows were damaged before the block.
    """
    query = "SELECT checksum FROM checks WHERE name = ?"
    stored = connection.execute(query, (name,)).fetchone()
    if stored is not None and not matches_checksum(connection, name, stored[0]):
        raise StoreCorrupt(
            f"the rows of {name} do not match their checksum",
            place=paths.JOURNAL,
            remedy="`harvester verify PATH --repair`",
        )
    yield
    write_checksum(connection, name)


def write_checksum(connection: sqlite3.Connection, name: str) -> None:
    """Write the checksum over the rows of `meta` or `counters:RUN`, without checking the old one."""
    connection.execute("INSERT OR REPLACE INTO checks VALUES (?, ?)", (name, _sum(connection, name)))


def matches_checksum(connection: sqlite3.Connection, name: str, check: object) -> bool:
    """Return whether the rows of `meta` or `counters:RUN` have this checksum."""
    try:
        return _sum(connection, name) == check
    except (TypeError, ValueError):  # a flipped bit in a name or a type
        return False


def meta_number(connection: sqlite3.Connection, name: str) -> int:
    """Return a value of `meta` that is a number."""
    (text,) = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return int(text)


def set_meta(connection: sqlite3.Connection, name: str, value: int) -> None:
    """Write a value of `meta`, inside an open transaction.

    Raises:
        StoreCorrupt: the rows of `meta` are damaged.
    """
    with updating_checksum(connection, "meta"):
        connection.execute("UPDATE meta SET value = ? WHERE name = ?", (str(value), name))


def _sum(connection: sqlite3.Connection, name: str) -> int:
    """Compute the checksum over the rows, in the order of their names."""
    table, _, run = name.partition(":")
    if table == "meta":
        rows = connection.execute("SELECT name, value FROM meta ORDER BY name").fetchall()
    else:
        query = "SELECT name, value FROM counters WHERE run = ? ORDER BY name"
        rows = connection.execute(query, (int(run),)).fetchall()
    return checksum([value for row in rows for value in row])

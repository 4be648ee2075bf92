"""Keep the batches of a store: which rows wait for an answer from which batch at the provider.

A batch and its rows are durable before anything of it is sent. A row leaves its batch in the transaction
that stores its answer or dead letter, or that opens it again. So a key that a batch may still answer is known
at any time, and is not asked a second time.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson

from harvester.api.types import Prompt, Request
from harvester.store import paths
from harvester.store.journal.checksums import COVERED, checksum, require_unchanged, set_meta
from harvester.store.journal.journal import KEYS_PER_LOOKUP, Journal
from harvester.store.journal.records import BatchRef, prompt_json
from harvester.store.journal.rows import add_counts, micros
from harvester.store.journal.sqlite import BATCH_ROWS, BATCHES, has_table
from harvester.system.counted import counted


class BatchState(StrEnum):
    """How far a batch has come here. The provider's own word for its state is `StoredBatch.status`."""

    INTENDED = "intended"  # written down; it may have been sent
    UPLOADED = "uploaded"  # its file is at the provider; the batch may have been created
    CREATED = "created"  # the provider has it
    ENDED = "ended"  # every row has left it


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """A batch as the journal remembers it.

    Attributes:
        number: in this store, from 1.
        run: number of the run that sent it.
        name: in the provider's metadata, by which the batch is found again.
        status: the provider's last word, "" before there is one.
        at: when it was written down, in Unix seconds.
        rows: how many it had at first.
        cancel: its cancellation was decided.
        file_id, batch_id: at the provider, "" while unknown.
        endpoint: base URL of the provider.
        message: why it ended otherwise than complete.
    """

    number: int
    run: int
    name: str
    state: BatchState
    status: str
    at: float
    rows: int
    cancel: bool
    file_id: str
    batch_id: str
    endpoint: str
    message: str = ""

    @property
    def ref(self) -> BatchRef:
        """The batch as the records of its rows name it."""
        return BatchRef(self.number, self.run, self.at)


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row that waits in a batch. Its request has no estimates but the input tokens."""

    request: Request
    batch: int
    attempt_id: int
    attempts: int
    reserved: tuple[int, int]


@dataclass(frozen=True, slots=True)
class WaitingBatches:
    """What the batches of a store hold: rows that wait, and what these may cost.

    `oldest_at` is when the oldest batch that has not ended was written down, in Unix seconds; None for none.
    """

    batches: int = 0
    rows: int = 0
    oldest_at: float | None = None
    reserved_tokens: int = 0
    reserved_microusd: int = 0
    open: tuple[Mapping[str, Any], ...] = ()

    def note(self) -> str:
        """Say what waits, and how it goes on."""
        cost = f"${self.reserved_microusd / 1e6:,.4f}"
        batches = counted(self.batches, "batch", "batches")
        return (
            f"waiting in batches: {counted(self.rows, 'row')} in {batches}, which may cost up to {cost}; "
            "the next run collects them"
        )

    def facts(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "batches": self.batches,
            "rows": self.rows,
            "oldest_at": self.oldest_at,
            "reserved_tokens": self.reserved_tokens,
            "reserved_microusd": self.reserved_microusd,
            "open": [dict(batch) for batch in self.open],
        }


def enter_batch(journal: Journal, batch: StoredBatch, rows: Sequence[BatchRow]) -> StoredBatch:
    """Write a new batch and its rows in one transaction; return it with its number and its run.

    Raises:
        StoreError: nothing is written.
    """
    entries = [_row_values(row) for row in rows]
    with journal.writing() as connection:
        connection.execute(BATCHES)
        connection.execute(BATCH_ROWS)
        query = "SELECT coalesce(max(batch), 0) + 1 FROM batches"
        (number,) = connection.execute(query).fetchone()
        entered = replace(batch, number=number, run=journal.run_number)
        connection.execute(
            "INSERT INTO batches (batch, run, name, state, status, at_us, rows, cancel, file_id, batch_id,"
            " endpoint, message, checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*(values := _batch_values(entered)), checksum(values)),
        )
        connection.executemany(
            "INSERT INTO batch_rows (batch, attempt_id, attempts, sample_index, input_tokens,"
            " reserved_tokens, reserved_microusd, key, prompt_json, body_json, checksum)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    number,
                    *scalars,
                    key,
                    prompt.decode(),
                    body.decode(),
                    checksum([number, *scalars], key, prompt, body),
                )
                for scalars, key, prompt, body in entries
            ],
        )
        set_meta(connection, "last_attempt_id", max(row.attempt_id for row in rows))
        add_counts(connection, journal.run_number, {"attempts": len(rows)})
    return entered


def change_batch(journal: Journal, batch: StoredBatch, **changes: Any) -> StoredBatch:
    """Write changed fields of a batch; return it as it is now."""
    changed = replace(batch, **changes)
    with journal.writing() as connection:
        write_batch(connection, changed)
    return changed


def write_batch(connection: sqlite3.Connection, batch: StoredBatch) -> None:
    """Write all fields of a batch, inside an open transaction."""
    values = _batch_values(batch)
    assigned = ", ".join(f"{name} = ?" for name in (*COVERED["batches"][0], "checksum"))
    connection.execute(
        f"UPDATE batches SET {assigned} WHERE batch = ?",  # noqa: S608 - our own names
        (*values, checksum(values), batch.number),
    )


def release_batch(journal: Journal, batch: StoredBatch, message: str) -> int:
    """End a batch that the provider never got or never began: its rows are open again. Return how many."""
    with journal.writing() as connection:
        write_batch(connection, replace(batch, state=BatchState.ENDED, message=message))
        query = "DELETE FROM batch_rows WHERE batch = ?"
        rows = connection.execute(query, (batch.number,)).rowcount
        add_counts(connection, batch.run, {"refunds": rows})
    return rows


def waiting_batches(connection: sqlite3.Connection) -> list[StoredBatch]:
    """Return the batches that have not ended, oldest first.

    Raises:
        StoreCorrupt: the row of one is damaged.
    """
    if not has_table(connection, "batches"):
        return []
    names = COVERED["batches"][0]
    query = f"SELECT {', '.join(names)}, checksum FROM batches WHERE state <> ? ORDER BY batch"  # noqa: S608
    rows = [
        dict(zip((*names, "checksum"), values, strict=True))
        for values in connection.execute(query, (BatchState.ENDED,))
    ]
    require_unchanged("batches", rows, Path(paths.JOURNAL))
    return [_stored(row) for row in rows]


def waiting_keys(connection: sqlite3.Connection) -> dict[bytes, int]:
    """Return the keys that wait in batches, each with the number of its batch."""
    if not has_table(connection, "batch_rows"):
        return {}
    return dict(connection.execute("SELECT key, batch FROM batch_rows").fetchall())


def rows_by_key(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, BatchRow]:
    """Return the rows that wait under these keys.

    Raises:
        StoreCorrupt: one is damaged.
    """
    rows: dict[bytes, BatchRow] = {}
    for start in range(0, len(keys), KEYS_PER_LOOKUP):
        chunk = keys[start : start + KEYS_PER_LOOKUP]
        holes = ",".join("?" * len(chunk))
        rows |= {row.request.key: row for row in _rows(connection, f"key IN ({holes})", chunk)}
    return rows


def rows_of_batch(connection: sqlite3.Connection, number: int, most: int = -1) -> list[BatchRow]:
    """Return the rows that wait in a batch, in the order in which they were written, up to `most`.

    Raises:
        StoreCorrupt: one is damaged.
    """
    return list(_rows(connection, "batch = ? ORDER BY id LIMIT ?", (number, most)))


def waiting_in_batches(connection: sqlite3.Connection) -> WaitingBatches:
    """Return how many batches and rows wait, since when, and what they may cost."""
    batches = waiting_batches(connection)
    if not batches:
        return WaitingBatches()
    query = (
        "SELECT batch, count(*), sum(reserved_tokens), sum(reserved_microusd) FROM batch_rows GROUP BY batch"
    )
    sums = {number: values for number, *values in connection.execute(query)}
    none = [0, 0, 0]
    return WaitingBatches(
        batches=len(batches),
        rows=sum(sums.get(batch.number, none)[0] for batch in batches),
        oldest_at=min(batch.at for batch in batches),
        reserved_tokens=sum(sums.get(batch.number, none)[1] for batch in batches),
        reserved_microusd=sum(sums.get(batch.number, none)[2] for batch in batches),
        open=tuple(
            {
                "name": batch.name,
                "batch_id": batch.batch_id,
                "state": str(batch.state),
                "status": batch.status,
                "at": datetime.fromtimestamp(batch.at, UTC).isoformat(timespec="milliseconds"),
                "rows": sums.get(batch.number, none)[0],
                "rows_at_first": batch.rows,
                "reserved_microusd": sums.get(batch.number, none)[2],
            }
            for batch in batches
        ),
    )


def _rows(connection: sqlite3.Connection, where: str, bound: Sequence[Any]) -> Iterator[BatchRow]:
    names = (*COVERED["batch_rows"][0], "checksum")
    query = f"SELECT {', '.join(names)} FROM batch_rows WHERE {where}"  # noqa: S608 - our own text
    for values in connection.execute(query, bound):
        row = dict(zip(names, values, strict=True))
        require_unchanged("batch_rows", [row], Path(paths.JOURNAL))
        yield _row_of(row)


def _row_of(row: Mapping[str, Any]) -> BatchRow:
    # Not orjson: lone surrogates and integers beyond 64 bits in metadata must come back as they were.
    prompt = json.loads(row["prompt_json"])
    request = Request(
        key=row["key"],
        prompt=Prompt(
            id=prompt["id"],
            messages=(),
            reference=prompt["reference"],
            tags=tuple(prompt["tags"]),
            metadata=prompt["metadata"],
            file=prompt["file"],
            line=prompt["line"],
        ),
        body=json.loads(row["body_json"]),
        sample_index=row["sample_index"],
        input_tokens=row["input_tokens"],
    )
    reserved = row["reserved_tokens"], row["reserved_microusd"]
    return BatchRow(request, row["batch"], row["attempt_id"], row["attempts"], reserved)


def _row_values(row: BatchRow) -> tuple[list[int], bytes, bytes, bytes]:
    """Return the short columns after `batch`, then key, prompt and body."""
    request = row.request
    scalars = [row.attempt_id, row.attempts, request.sample_index, request.input_tokens, *row.reserved]
    return scalars, request.key, prompt_json(request.prompt), orjson.dumps(request.body)


def _batch_values(batch: StoredBatch) -> list[Any]:
    return [
        batch.number,
        batch.run,
        batch.name,
        str(batch.state),
        batch.status,
        micros(batch.at),
        batch.rows,
        int(batch.cancel),
        batch.file_id,
        batch.batch_id,
        batch.endpoint,
        batch.message,
    ]


def _stored(row: Mapping[str, Any]) -> StoredBatch:
    return StoredBatch(
        number=row["batch"],
        run=row["run"],
        name=row["name"],
        state=BatchState(row["state"]),
        status=row["status"],
        at=row["at_us"] / 1e6,
        rows=row["rows"],
        cancel=bool(row["cancel"]),
        file_id=row["file_id"],
        batch_id=row["batch_id"],
        endpoint=row["endpoint"],
        message=row["message"],
    )

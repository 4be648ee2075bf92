"""Derive the columns of stored answers from their raw bodies again, after the program learned to read more.

Nothing is asked again and nothing is paid. Shards with rows that change are rewritten, one by one, and
exchanged as merging and purge do it; the outcome in the key index and the counts by outcome follow. A kill at
any instant leaves a valid store, and the next call completes the work.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from harvester.api.types import Outcome
from harvester.store import paths
from harvester.store.journal.checksums import COVERED, checksum, require_unchanged
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import ShardEntry
from harvester.store.journal.rows import add_counts, forget_finished
from harvester.store.journal.sqlite import OUTCOME_CODES, OUTCOMES
from harvester.store.shards import batching
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.parquet_file import open_shard
from harvester.store.shards.rewrite import rewrite
from harvester.store.shards.sample import PARSED, parse_answer, parsed_columns
from harvester.store.shards.schema import SCHEMA, with_added_columns
from harvester.store.shards.seal import finish_interrupted
from harvester.store.shards.steps import run_to_end
from harvester.system.failpoints import reach

# What a row is derived from.
_SOURCES = ("raw", "request_json", "input_tokens", "output_tokens")
_COLUMNS = tuple(sorted(PARSED))
_ROWS_PER_SLICE = 256


@dataclass(frozen=True, slots=True)
class Rederived:
    """What `rederive` did.

    Attributes:
        rows: answers that were derived again.
        changed: those of which a column changed.
        shards: shards that were rewritten.
        outcomes: answers whose outcome changed, by "old -> new".
    """

    rows: int = 0
    changed: int = 0
    shards: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Rederived) -> Rederived:
        """Return both together."""
        return Rederived(
            self.rows + other.rows,
            self.changed + other.changed,
            self.shards + other.shards,
            self.outcomes + other.outcomes,
        )


def rederive(store: Path) -> Rederived:
    """Derive the columns of a store's answers again (`harvester rederive`).

    Raises:
        StoreLocked: a run holds the store, or a reader the shards; what was rewritten before stays.
        StoreError: no store here, or the disk refuses; StoreFull, StoreCorrupt by cause.
    """
    Journal.open(store, read_only=True).close()  # a folder that is no store must not become one
    with StoreLock(store, started_at=time.time()), closing(Journal.open(store)) as journal:
        finish_interrupted(journal, store)
        result = _rederive_unsealed(journal)
        for entry in read_manifest(journal):
            result += _rederive_shard(journal, store, entry)
        return result


def _rederive_shard(journal: Journal, store: Path, entry: ShardEntry) -> Rederived:
    outcomes: dict[bytes, tuple[str, str]] = {}
    changed = 0
    with open_shard(store / paths.SHARDS / entry.name) as file:
        for number in range(file.num_row_groups):
            table = with_added_columns(file.read_row_group(number))
            for part in _slices(table):
                new = _derived(part)
                changed += _count_changed(part, new)
                columns = (part["key"], new["outcome"], part["run_id"])
                for key, outcome, run_id in zip(*(column.to_pylist() for column in columns), strict=True):
                    outcomes[bytes.fromhex(key)] = (outcome, run_id)
    if changed:
        run_to_end(rewrite(journal, store, [entry], change=derive_again))
    reach("rederive.before_index")
    return Rederived(entry.rows, changed, int(changed > 0), _update_index(journal, outcomes))


def derive_again(table: pa.Table) -> pa.Table:
    """Return the rows with their derived columns derived again; the others are as they were."""
    return pa.concat_tables([_derived(part) for part in _slices(table)] or [table])


def _slices(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows in parts: as objects, log-probabilities are eight times their raw bytes."""
    for batch in table.to_batches(max_chunksize=_ROWS_PER_SLICE):
        for part in batching.split_batch(batch):
            yield pa.Table.from_batches([part])


def _derived(part: pa.Table) -> pa.Table:
    rows = [
        parsed_columns(parse_answer(row, orjson.loads(row["request_json"])))
        for row in part.select(_SOURCES).to_pylist()
    ]
    for name in _COLUMNS:
        column = pa.array([row[name] for row in rows], type=SCHEMA.field(name).type)
        place = part.schema.get_field_index(name)
        part = part.set_column(place, part.schema.field(name), column)
    return part


def _count_changed(old: pa.Table, new: pa.Table) -> int:
    names = [name for name in _COLUMNS if not old[name].equals(new[name])]
    if not names:
        return 0
    pairs = zip(old.select(names).to_pylist(), new.select(names).to_pylist(), strict=True)
    return sum(str(before) != str(after) for before, after in pairs)  # as text, NaN equals NaN


def _update_index(journal: Journal, outcomes: Mapping[bytes, tuple[str, str]]) -> Counter[str]:
    """Write outcomes that differ from those in the key index, and move them in the counts of their runs.

    Returns the number of answers by "old -> new".
    """
    columns, short = COVERED["keys"]
    query = f"SELECT {', '.join(columns)}, checksum FROM keys WHERE key = ?"  # noqa: S608 - our own names
    moved: Counter[tuple[int, str, str]] = Counter()
    with journal.reading() as connection:
        runs = dict(connection.execute("SELECT run_id, run FROM runs").fetchall())
        stale = []
        for key, (outcome, run_id) in outcomes.items():
            row = connection.execute(query, (key,)).fetchone()
            if row is not None and row[columns.index("outcome")] != OUTCOME_CODES[Outcome(outcome)]:
                stale.append(dict(zip((*columns, "checksum"), row, strict=True)))
                moved[runs.get(run_id, 0), OUTCOMES[stale[-1]["outcome"]], outcome] += 1
    require_unchanged("keys", stale, journal.path)
    if not stale:
        return Counter()
    with journal.writing() as connection:
        for row in stale:
            row["outcome"] = OUTCOME_CODES[Outcome(outcomes[row["key"]][0])]
            _set_outcome(connection, "keys", row, columns, short)
        _move_counts(connection, moved)
        forget_finished(connection)
    return _by_change(moved)


def _by_change(moved: Mapping[tuple[int, str, str], int]) -> Counter[str]:
    changes = Counter[str]()
    for (_, before, after), count in moved.items():
        changes[f"{before} -> {after}"] += count
    return changes


def _rederive_unsealed(journal: Journal) -> Rederived:
    """Do the same for answers in the journal, of which only the outcome is stored as a column."""
    columns, short = COVERED["answers"]
    query = f"SELECT id, checksum, {', '.join(columns)} FROM answers WHERE id > ? ORDER BY id LIMIT ?"  # noqa: S608
    last_id, result = 0, Rederived()
    while True:
        with journal.reading() as connection, closing(connection.execute(query, (last_id, 64))) as cursor:
            rows = next(batching.batch_answers(cursor), [])
        if not rows:
            return result
        last_id = rows[-1]["id"]
        require_unchanged("answers", rows, journal.path)
        stale, moved = [], Counter[tuple[int, str, str]]()
        for row in rows:
            outcome = parse_answer(row, orjson.loads(row["body_json"]), logprobs=False).outcome
            before: str = OUTCOMES[row["outcome"]]
            if outcome != before:
                moved[row["run"], before, outcome] += 1
                row["outcome"] = OUTCOME_CODES[outcome]
                stale.append(row)
        if stale:
            with journal.writing() as connection:
                for row in stale:
                    _set_outcome(connection, "answers", row, columns, short)
                _move_counts(connection, moved)
                forget_finished(connection)
        result += Rederived(len(rows), len(stale), 0, _by_change(moved))


def _set_outcome(
    connection: sqlite3.Connection, table: str, row: Mapping[str, Any], columns: tuple[str, ...], short: int
) -> None:
    values = [row[name] for name in columns]
    long = [value.encode() if isinstance(value, str) else value for value in values[short:]]
    connection.execute(
        f"UPDATE {table} SET outcome = ?, checksum = ? WHERE key = ?",  # noqa: S608 - our own names
        (row["outcome"], checksum(values[:short], *long), row["key"]),
    )


def _move_counts(connection: sqlite3.Connection, moved: Mapping[tuple[int, str, str], int]) -> None:
    """Move answers from one outcome to another in the counters of their runs; run 0 has none."""
    for (run, before, after), count in moved.items():
        if not run:
            continue
        add_counts(connection, run, {f"outcome.{before}": -count, f"outcome.{after}": count})

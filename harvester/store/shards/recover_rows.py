"""Recover the rows of a damaged shard whose content can be verified; the others are asked for again.

Page checksums cover the content of a page, not its header and not the footer, so a flipped bit can change
values without an error. A row is kept when all of this holds:

- the key index lists its key for this shard, with the `asker_digest` of its prompt;
- the key is that of its request (`request_json`, teacher, sample number, an epoch);
- deriving the row again from `raw`, `request_json` and the journal's lineage gives the very same row, or
  differs only in what an earlier release may have read out of `raw` otherwise (`_is_of_earlier_release`);
- its time lies within its run, and the columns that can't be cross-checked have the minimum and maximum
  of the row group's statistics.

Where pages can't be read, the rows before them are kept, and columns that are derived anyway are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harvester.api.max_tokens import max_tokens_of
from harvester.api.replies import completion
from harvester.api.request_key import request_key
from harvester.api.scoring.request_forms import endpoint_in_key
from harvester.api.types import USAGE_CORRECTED, USAGE_ESTIMATED, USAGE_REPORTED, Outcome, Prompt
from harvester.errors import TeacherError
from harvester.store import paths
from harvester.store.journal.adoptions import read_adoptions
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry, asker_digest, prompt_json
from harvester.store.journal.rows import micros
from harvester.store.journal.sqlite import OUTCOMES
from harvester.store.shards import batching
from harvester.store.shards.parquet_file import FORMER_KEY
from harvester.store.shards.sample import PARSED, sample_of
from harvester.store.shards.schema import ADDED_COLUMNS, SCHEMA, Sample, to_table, with_added_columns
from harvester.system.files import sha256_of
from harvester.terms.lineage import Lineage

# Columns that can't be cross-checked with other columns.
UNCHECKED_COLUMNS = (
    "source_file",
    "source_line",
    "endpoint",
    "input_tokens",
    "output_tokens",
    "cost_microusd",
    "attempts",
    "latency_s",
    "created_at",
)
# Columns that are derived again from the request, the raw body and the lineage where they can't be read.
DERIVED_COLUMNS = PARSED | {
    *("messages", "teacher_id", "request_model", "terms_id", "permission_sha256", "purpose", "mock"),
    *("config_sha256", "tool_version"),
}
# Rows of a column that are read at a time: those before a damaged page are kept.
_ROWS_AT_ONCE = 64
# A row does not contain its epoch: that of its run's configuration is tried, then 0 to EPOCHS - 1.
EPOCHS = 1000
# Columns with texts of the raw body.
_TEXT_COLUMNS = PARSED - {"outcome", "logprobs", "cached_tokens", "reasoning_tokens", "usage_source"}
_USAGE_SOURCES = frozenset({USAGE_REPORTED, USAGE_ESTIMATED, USAGE_CORRECTED})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_US = 86_400_000_000
_LONGEST_RUN_US = 3650 * _DAY_US
UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError),
    *(TeacherError, RecursionError),
)


@dataclass(frozen=True, slots=True)
class _Run:
    lineage: Lineage
    started_us: int
    epoch: int


class RowVerifier:
    """Verifies rows of one shard against the journal's key index and runs."""

    def __init__(self, journal: Journal, entry: ShardEntry) -> None:
        with journal.reading() as connection:
            query = "SELECT key, max_tokens, asker, outcome FROM keys WHERE shard = ?"
            entries = connection.execute(query, (entry.shard,)).fetchall()
            self._index = {key: (most, asker) for key, most, asker, _ in entries}
            self._outcomes = {key.hex(): OUTCOMES.get(code, "") for key, _, _, code in entries}
            query = "SELECT started_us, lineage_json, config_json FROM runs"
            runs = [(at, Lineage.from_json(text), config) for at, text, config in connection.execute(query)]
            self._adoptions = read_adoptions(connection)
        self._runs = {lineage.run_id: _Run(lineage, at, _epoch(config)) for at, lineage, config in runs}

    def verified_rows(self, table: pa.Table) -> pa.Table:
        """Return the rows of a table that can be verified, with all columns of `SCHEMA`.

        Args:
            table: columns of `SCHEMA`; of `DERIVED_COLUMNS` any may be missing.
        """
        lacking = [name for name in SCHEMA.names if name not in table.column_names]
        verified = [SCHEMA.empty_table()]
        for batch in table.to_batches():
            for portion in batching.split_batch(batch):
                rows = self._verified(portion.to_pylist(), lacking)
                verified.append(pa.Table.from_pylist(rows, schema=SCHEMA))
        return pa.concat_tables(verified)

    def _verified(self, rows: Sequence[Mapping[str, Any]], lacking: Sequence[str]) -> list[Mapping[str, Any]]:
        derived = [self._derived(row) for row in rows]
        expected = iter(to_table([sample for sample in derived if sample is not None]).to_pylist())
        verified: list[Mapping[str, Any]] = []
        for sample, row in zip(derived, rows, strict=True):
            if sample is not None:
                wanted = next(expected)
                whole = {**row, **{name: wanted[name] for name in lacking}}
                if self._is_equal(wanted, whole):
                    verified.append(whole)
        return verified

    def _is_equal(self, derived: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        return derived == row or _is_of_earlier_release(derived, row, self._outcomes[row["key"]])

    def _derived(self, row: Mapping[str, Any]) -> Sample | None:
        """Derive the row again from its request and raw answer; None where key, asker or time disagree."""
        try:
            run, key = self._runs[row["run_id"]], bytes.fromhex(row["key"])
            body = orjson.loads(row["request_json"])
            prompt = prompt_of(row)
            at_us = (row["created_at"] - _EPOCH) // timedelta(microseconds=1)
            if (
                self._index[key] != (max_tokens_of(body), asker_digest(prompt, row["sample_index"]))
                or not -_DAY_US <= at_us - run.started_us <= _LONGEST_RUN_US
                or not self._is_key(key, run, body, row)
            ):
                return None
            journalled = {
                **row,
                "key": key,
                "body_json": row["request_json"],
                "prompt_json": prompt_json(prompt),
                "at_us": at_us,
                "latency_us": micros(row["latency_s"]),
            }
            return sample_of(journalled, run.lineage)
        except UNREADABLE:
            return None

    def _is_key(self, key: bytes, run: _Run, body: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        """Whether the key is that of the request, and the former key too, where the row was adopted."""
        name = run.lineage.teacher_name
        former = bytes.fromhex(row[FORMER_KEY])
        adoption = self._adoptions.get(name)
        if former and adoption is None:
            return False
        epoch = _epoch_of(former or key, name, run, body, row["sample_index"])
        if epoch is None and not former and adoption is not None:  # a copy of an adopted row
            return _epoch_of(key, adoption.identity, run, body, row["sample_index"]) is not None
        if not former or adoption is None or epoch is None:
            return epoch is not None
        endpoint = endpoint_in_key(adoption.identity, body)
        return request_key(endpoint, body, row["sample_index"], epoch) == key


def recoverable_rows(journal: Journal, store: Path, entry: ShardEntry) -> Iterator[pa.Table]:
    """Yield the row groups of a shard: all rows where its hash is unchanged, else the verified rows."""
    path = store / paths.SHARDS / entry.name
    try:
        is_as_sealed = sha256_of(path) == entry.sha256
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            verifier = RowVerifier(journal, entry)
            for number in range(file.num_row_groups):
                try:
                    if is_as_sealed:
                        table = file.read_row_group(number)
                        table.validate(full=True)
                        table = with_added_columns(table).cast(SCHEMA)
                    else:
                        table = verifier.verified_rows(_readable_part(file, number))
                except UNREADABLE:
                    continue
                yield table
    except UNREADABLE:
        return


def _readable_part(file: pq.ParquetFile, number: int) -> pa.Table:
    """Read a row group column by column, up to the first damaged page of those that can't be derived.

    Raises:
        ValueError: a column that can't be cross-checked is not complete, or not as its statistics say.
    """
    rows = file.metadata.row_group(number).num_rows
    columns = {
        name: _readable_rows(file, number, name) for name in SCHEMA.names if name in file.schema_arrow.names
    }
    added = {name: pa.array([""] * rows, pa.string()) for name in ADDED_COLUMNS - columns.keys()}
    columns |= {name: pa.chunked_array([values]) for name, values in added.items()}
    if any(len(columns[name]) != rows for name in UNCHECKED_COLUMNS):
        raise ValueError("a column that can't be cross-checked is damaged")
    _require_statistics(file, number, pa.table({name: columns[name] for name in UNCHECKED_COLUMNS}))
    readable = min(len(columns[name]) for name in SCHEMA.names if name not in DERIVED_COLUMNS)
    kept = [name for name in SCHEMA.names if name in columns and len(columns[name]) >= readable]
    schema = pa.schema([SCHEMA.field(name) for name in kept])
    return pa.table([columns[name].slice(0, readable) for name in kept], schema=schema)


def _readable_rows(file: pq.ParquetFile, number: int, name: str) -> pa.ChunkedArray:
    """Read a column of a row group up to its first damaged page."""
    kind = SCHEMA.field(name).type
    chunks: list[pa.Array] = []
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[number], columns=[name]):
            batch.validate(full=True)
            chunks.append(batch.column(0).cast(kind))
    except UNREADABLE:
        pass
    return pa.chunked_array(chunks, kind)


def _is_of_earlier_release(derived: Mapping[str, Any], row: Mapping[str, Any], outcome: str) -> bool:
    """Whether a row differs only in what an earlier release may have read out of the raw body otherwise.

    Its texts must be in the raw body all the same, its outcome must be that of the key index, and a column
    that it lacks must be one that its outcome does not need. `harvester rederive` reads such rows again.

    Args:
        derived: the row as this release derives it.
        outcome: what the key index says.
    """
    if any(derived[name] != row[name] for name in derived.keys() - PARSED) or row["outcome"] != outcome:
        return False
    if row["outcome"] == Outcome.OK and not row["completion"]:
        return False
    differing = [name for name in PARSED if derived[name] != row[name]]
    if any(row[name] for name in ("logprobs", "cached_tokens", "reasoning_tokens") if name in differing):
        return False
    try:
        spelled = _texts_of_raw(row["raw"])
    except UNREADABLE:
        return False
    texts = [row[name] for name in differing if name in _TEXT_COLUMNS and row[name]]
    is_anchored = bool(row["response_id"]) and row["response_id"] in spelled
    return is_anchored and all(text in spelled for text in texts) and row["usage_source"] in _USAGE_SOURCES


def _texts_of_raw(raw: bytes) -> str:
    """All texts of a raw body, pieces of streams and parts put together, and tool calls as JSON."""
    document, _ = completion.load(raw)
    found: list[str] = []
    waiting: list[Any] = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            if isinstance(value, dict) and value.get("tool_calls"):
                found.append(orjson.dumps(value["tool_calls"]).decode())
            waiting += reversed(list(value.values()) if isinstance(value, dict) else value)
    return "\n".join(found)


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a sealed row, without its messages."""
    return Prompt(
        id=row["prompt_id"],
        messages=(),
        reference=row["reference"],
        tags=tuple(row["tags"]),
        metadata=json.loads(row["metadata_json"]),
        file=row["source_file"],
        line=row["source_line"],
    )


def _epoch_of(key: bytes, name: str, run: _Run, body: Mapping[str, Any], sample_index: int) -> int | None:
    """Return the epoch with which a key is that of the request to the teacher of this name; None for none."""
    endpoint = endpoint_in_key(name, body)
    epochs = chain([run.epoch], range(EPOCHS))
    return next((e for e in epochs if request_key(endpoint, body, sample_index, e) == key), None)


def _epoch(config_json: str) -> int:
    return int(orjson.loads(config_json).get("run", {}).get("epoch", 0))


def _require_statistics(file: pq.ParquetFile, number: int, table: pa.Table) -> None:
    """Raise ValueError where the minimum or maximum of a column differs from the footer's statistics."""
    group = file.metadata.row_group(number)
    columns = {group.column(place).path_in_schema: place for place in range(group.num_columns)}
    for name in UNCHECKED_COLUMNS:
        noted = group.column(columns[name]).statistics
        limits = pc.min_max(table.column(name)).as_py()
        if noted is None or not noted.has_min_max or (noted.min, noted.max) != (limits["min"], limits["max"]):
            raise ValueError(f"{name} does not match its statistics")

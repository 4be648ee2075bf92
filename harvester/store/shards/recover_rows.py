"""Recover the rows of a damaged shard whose content can be verified; the others are asked for again.

Page checksums cover the content of a page, not its header and not the footer, so a flipped bit can change
values without an error. A row is kept when all of this holds:

- the key index lists its key for this shard, with the `asker_digest` of its prompt;
- the key is that of its request (`request_json`, teacher, sample number, an epoch);
- deriving the row again from `raw`, `request_json` and the journal's lineage gives the very same row, or
  differs only in what an earlier release may have read out of `raw` otherwise (`_is_of_earlier_release`);
- its time lies within its run, and the columns that can't be cross-checked have the minimum and maximum
  of the row group's statistics.
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

from harvester.api import completion
from harvester.api.max_tokens import max_tokens_of
from harvester.api.request_key import request_key
from harvester.api.types import USAGE_CORRECTED, USAGE_ESTIMATED, USAGE_REPORTED, Outcome, Prompt
from harvester.errors import TeacherError
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import ShardEntry, asker_digest, prompt_json
from harvester.store.journal.rows import micros
from harvester.store.journal.sqlite import OUTCOMES
from harvester.store.shards import batching
from harvester.store.shards.sample import PARSED, sample_of
from harvester.store.shards.schema import SCHEMA, Sample, to_table, with_added_columns
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
        self._runs = {lineage.run_id: _Run(lineage, at, _epoch(config)) for at, lineage, config in runs}

    def verified_rows(self, table: pa.Table) -> pa.Table:
        """Return the rows of a table (of exactly `SCHEMA`) that can be verified."""
        kept: list[bool] = []
        for batch in table.to_batches():
            for portion in batching.split_batch(batch):
                kept += self._are_verified(portion.to_pylist())
        return table.filter(pa.array(kept, pa.bool_()))

    def _are_verified(self, rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        derived = [self._derived(row) for row in rows]
        expected = iter(to_table([sample for sample in derived if sample is not None]).to_pylist())
        pairs = zip(derived, rows, strict=True)
        return [sample is not None and self._is_equal(next(expected), row) for sample, row in pairs]

    def _is_equal(self, derived: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
        return derived == row or _is_of_earlier_release(derived, row, self._outcomes[row["key"]])

    def _derived(self, row: Mapping[str, Any]) -> Sample | None:
        """Derive the row again from its request and raw answer; None where key, asker or time disagree."""
        try:
            run, key = self._runs[row["run_id"]], bytes.fromhex(row["key"])
            body = orjson.loads(row["request_json"])
            prompt = _prompt(row)
            at_us = (row["created_at"] - _EPOCH) // timedelta(microseconds=1)
            if (
                self._index[key] != (max_tokens_of(body), asker_digest(prompt, row["sample_index"]))
                or not -_DAY_US <= at_us - run.started_us <= _LONGEST_RUN_US
                or not _is_key(key, run, body, row["sample_index"])
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


def recoverable_rows(journal: Journal, store: Path, entry: ShardEntry) -> Iterator[pa.Table]:
    """Yield the row groups of a shard: all rows where its hash is unchanged, else the verified rows."""
    path = store / paths.SHARDS / entry.name
    try:
        is_as_sealed = sha256_of(path) == entry.sha256
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            verifier = RowVerifier(journal, entry)
            for number in range(file.num_row_groups):
                try:
                    table = file.read_row_group(number)
                    table.validate(full=True)
                    table = with_added_columns(table).cast(SCHEMA)
                    if not is_as_sealed:
                        _require_statistics(file, number, table)
                        table = verifier.verified_rows(table)
                except UNREADABLE:
                    continue
                yield table
    except UNREADABLE:
        return


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


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(
        id=row["prompt_id"],
        messages=(),
        reference=row["reference"],
        tags=tuple(row["tags"]),
        metadata=json.loads(row["metadata_json"]),
        file=row["source_file"],
        line=row["source_line"],
    )


def _is_key(key: bytes, run: _Run, body: Mapping[str, Any], sample_index: int) -> bool:
    endpoint = run.lineage.teacher_id.removesuffix(f"|{run.lineage.model}")
    epochs = chain([run.epoch], range(EPOCHS))
    return any(request_key(endpoint, body, sample_index, epoch) == key for epoch in epochs)


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

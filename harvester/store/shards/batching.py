"""Rows a few at a time, counted in bytes: with log-probabilities one is a megabyte, else a kilobyte.

As Python objects a row is up to eight times as large as on disk: little is turned into them at once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROWS = 512
"""Most rows of a portion."""
MAX_BYTES = 1 << 20
"""A portion ends with the row that reaches this."""


def batch_answers(cursor: sqlite3.Cursor, most_rows: int = MAX_ROWS) -> Iterator[list[dict[str, Any]]]:
    """Rows of a query over `answers` (its columns named, `raw` and `body_json` among them), in its order."""
    names = [column[0] for column in cursor.description]
    portion: list[dict[str, Any]] = []
    size = 0
    for values in cursor:
        row = dict(zip(names, values, strict=True))
        portion.append(row)
        size += len(row["raw"]) + len(row["body_json"])
        if len(portion) >= most_rows or size >= MAX_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def batch_file(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, in its order; a row that is larger than a portion comes alone."""
    wanted = set(columns)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.partition(".")[0] in wanted
        )
        rows = max(1, min(MAX_ROWS, MAX_BYTES * group.num_rows // max(1, size)))
        for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=list(columns)):
            yield from split_batch(batch)


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch cut until no part of more than one row is larger than a portion."""
    if batch.num_rows <= 1 or (batch.num_rows <= MAX_ROWS and batch.nbytes <= MAX_BYTES):
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from split_batch(batch.slice(0, half))
    yield from split_batch(batch.slice(half))

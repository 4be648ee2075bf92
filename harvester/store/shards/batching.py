"""Read rows in batches of limited size.

A row has about a kilobyte, or a megabyte with log-probabilities, and up to eight times as much as Python
objects. So a batch is limited in bytes as well as in rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MAX_ROWS = 512
# A batch ends with the row that reaches this size.
MAX_BYTES = 1 << 20


def batch_answers(cursor: sqlite3.Cursor, most_rows: int = MAX_ROWS) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of a query over `answers` in batches; it must select `raw` and `body_json`."""
    names = [column[0] for column in cursor.description]
    batch: list[dict[str, Any]] = []
    size = 0
    for values in cursor:
        row = dict(zip(names, values, strict=True))
        batch.append(row)
        size += len(row["raw"]) + len(row["body_json"])
        if len(batch) >= most_rows or size >= MAX_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def batch_file(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a file in batches; a row larger than a batch comes alone."""
    for number in range(file.num_row_groups):
        yield from batch_group(file, number, columns)


def batch_group(file: pq.ParquetFile, number: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of one row group of a file in batches, as `batch_file`."""
    wanted = set(columns)
    group = file.metadata.row_group(number)
    chunks = (group.column(place) for place in range(group.num_columns))
    size = sum(
        chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in wanted
    )
    rows = max(1, min(MAX_ROWS, MAX_BYTES * group.num_rows // max(1, size)))
    for batch in file.iter_batches(batch_size=rows, row_groups=[number], columns=list(columns)):
        yield from split_batch(batch)


def split_batch(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """Split a batch until no part with more than one row exceeds the limits."""
    if batch.num_rows <= 1 or (batch.num_rows <= MAX_ROWS and batch.nbytes <= MAX_BYTES):
        if batch.num_rows:
            yield batch
        return
    half = batch.num_rows // 2
    yield from split_batch(batch.slice(0, half))
    yield from split_batch(batch.slice(half))

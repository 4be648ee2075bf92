"""Read the rows of a shard that have given values in some columns, and no more of the others than needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harvester.store.shards import batching


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """A batch, and which of its rows have the values: None for all of them.

    Attributes:
        passed_over: rows of the file before this batch that were not read, because none has the values.
    """

    batch: pa.RecordBatch
    is_chosen: pa.Array | None
    passed_over: int = 0

    def rows(self) -> pa.RecordBatch:
        """Return the rows that have the values."""
        return self.batch if self.is_chosen is None else self.batch.filter(self.is_chosen)


def read_chosen(
    file: pq.ParquetFile, columns: Sequence[str], values: Mapping[str, Collection[str]]
) -> Iterator[ChosenRows]:
    """Yield the row groups that have a row with these values, in batches of limited size.

    Of each group the columns of `values` are read first. A group without a match is passed over, and the
    other columns are not read.

    Args:
        columns: that are read; those of `values` are among them.
        values: the values that each of these text columns may have. A column that the file lacks, or that
            holds no text, decides nothing.
    """
    # Made once: there may be a hundred thousand of them.
    tested = dict(_texts(file.schema_arrow, values))
    passed_over = 0
    for number in range(file.num_row_groups):
        if tested and not _has_match(file, number, tested):
            passed_over += file.metadata.row_group(number).num_rows
            continue
        for batch in batching.batch_group(file, number, columns):
            yield ChosenRows(batch, _mask(batch, tested) if tested else None, passed_over)
            passed_over = 0
    if passed_over:
        empty = pa.RecordBatch.from_pylist([], schema=pa.schema([]))
        yield ChosenRows(empty, None, passed_over)


def _texts(schema: pa.Schema, values: Mapping[str, Collection[str]]) -> Iterator[tuple[str, pa.Array]]:
    """Yield the columns that are tested, each with its values in the column's own type."""
    for name, texts in values.items():
        if (kind := _text_type(schema, name)) is not None:
            yield name, pa.array(list(texts), kind)


def _text_type(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Return the type of a column's values, if there is one column of this name, and its values are text."""
    if schema.names.count(name) != 1:
        return None
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _has_match(file: pq.ParquetFile, number: int, tested: Mapping[str, pa.Array]) -> bool:
    table = file.read_row_group(number, columns=list(tested))
    return any(pc.any(_mask(batch, tested)).as_py() for batch in table.to_batches())


def _mask(batch: pa.RecordBatch, tested: Mapping[str, pa.Array]) -> pa.Array:
    """Return for each row whether all of its tested columns have one of their values."""
    mask = None
    for name, texts in tested.items():
        column = batch.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        matches = pc.is_in(column, value_set=texts)
        mask = matches if mask is None else pc.and_(mask, matches)
    return mask

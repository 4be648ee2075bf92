"""Read the samples of a store from Python: iterate, filter, convert to Arrow and pandas."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from harvester.errors import UsageError
from harvester.store.reader import Corpus
from harvester.store.shards.schema import SCHEMA, Sample, to_table
from harvester.store.where import Where

if TYPE_CHECKING:
    import pandas as pd

# Samples that are converted to Arrow together.
_CHUNK = 512


class Samples:
    """The samples of a store, or of any folder of shards; all of them, or those that a condition chooses.

    Each pass over them reads the files again, from one snapshot, also while a run writes. A sample comes once
    for each prompt that asked for it.

    Args:
        store: the folder.
        columns: that are read; the fields of a `Sample` that were not read keep their defaults. None: all.
        where: the condition, as `where` in curate.toml: a table, or the inside of its braces as text. Shards
            are read no further than it needs.
        include_unsealed: also answers that are not in a shard yet.

    Raises:
        ConfigError: the condition can't be used. UsageError: there is no such column.
        StoreError, StoreCorrupt, StoreFormatError: no corpus is there, or it is damaged.
    """

    def __init__(
        self,
        store: Path,
        *,
        columns: Sequence[str] | None = None,
        where: str | Mapping[str, Any] = "",
        include_unsealed: bool = True,
    ) -> None:
        self._columns = list(SCHEMA.names if columns is None else columns)
        unknown = sorted(set(self._columns) - set(SCHEMA.names))
        if unknown:
            raise UsageError(
                f"there is no column {unknown[0]!r}",
                place="columns",
                remedy=f"the columns are {', '.join(SCHEMA.names)}",
            )
        self._where = Where.parse(where).bind(store) if where else None
        self._include_unsealed = include_unsealed
        self._corpus = Corpus.open(store)
        self.store = store

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(self._columns)

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples, in bounded memory.

        Raises:
            StoreError, StoreCorrupt: a file is missing, or is not what was sealed.
        """
        return self._corpus.samples(self._columns, include_unsealed=self._include_unsealed, where=self._where)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the samples as Arrow batches of limited size."""
        samples = iter(self)
        while chunk := list(islice(samples, _CHUNK)):
            yield from to_table(chunk).select(self._columns).to_batches()

    def to_arrow(self) -> pa.Table:
        """Return the samples as an Arrow table, which has to fit into memory."""
        schema = pa.schema([SCHEMA.field(name) for name in self._columns])
        return pa.Table.from_batches(self.batches(), schema=schema)

    def to_pandas(self) -> pd.DataFrame:
        """Return the samples as a data frame.

        Raises:
            UsageError: pandas is not installed.
        """
        if importlib.util.find_spec("pandas") is None:
            raise UsageError("pandas is not installed", place="to_pandas", remedy="pip install pandas")
        return self.to_arrow().to_pandas()

    def __repr__(self) -> str:
        chosen = f", where {self._where.text}" if self._where is not None else ""
        return f"<samples of {self.store}{chosen}>"

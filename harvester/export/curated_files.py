"""Write the rows of a curated corpus to Parquet files, one or more for each lineage."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from harvester.errors import StoreCorrupt
from harvester.store.shards import batching
from harvester.store.shards.parquet_file import BYTES_PER_GROUP, ROWS_PER_GROUP, lineage_digest, open_writer
from harvester.store.shards.schema import Sample, to_table
from harvester.terms.lineage import Lineage

# Files open for writing at a time; each keeps a row group in memory.
MOST_OPEN = 8


class _CuratedFile:
    """One file: rows of runs with one lineage digest, a row group at a time.

    Its lineages are written before its rows, so they are those of all these runs, kept rows or none.
    """

    def __init__(self, path: Path, lineages: Sequence[Lineage]) -> None:
        self._samples: list[Sample] = []
        self._sample_bytes = self._waiting_bytes = self._waiting_rows = 0
        self._waiting: list[pa.Table] = []
        self._sink = path.open("xb")
        self._writer = open_writer(self._sink, lineages)

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)
        self._sample_bytes += len(sample.raw) + len(sample.request_json)
        if len(self._samples) >= batching.MAX_ROWS or self._sample_bytes >= batching.MAX_BYTES:
            self._to_table()
        if self._waiting_rows >= ROWS_PER_GROUP or self._waiting_bytes >= BYTES_PER_GROUP:
            self._write()

    def _to_table(self) -> None:
        """Convert samples to an Arrow table, where log-probabilities take a fraction of the memory."""
        try:
            table = to_table(self._samples)
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise StoreCorrupt(f"a row has a value of another type: {error}") from None
        self._waiting.append(table)
        self._waiting_rows += len(self._samples)
        self._waiting_bytes += self._sample_bytes
        self._samples, self._sample_bytes = [], 0

    def _write(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting).combine_chunks()
            self._writer.write_table(table.cast(self._writer.schema))
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0

    def finish(self) -> None:
        """Write what waits, and make the file durable."""
        if self._samples:
            self._to_table()
        self._write()
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()

    def drop(self) -> None:
        """Close the file without finishing it."""
        with contextlib.suppress(pa.ArrowException, OSError, ValueError):
            self._writer.close()  # before its sink: closed later, it would write to a closed file
        self._sink.close()


class CuratedFiles:
    """The files of a curated corpus; a few are open at once, whatever the number of runs and lineages."""

    def __init__(self, folder: Path, lineages: Mapping[str, Lineage]) -> None:
        self._folder = folder
        self._digests = {run: lineage_digest(lineage) for run, lineage in lineages.items()}
        self._alike: dict[str, list[Lineage]] = {}
        for run, lineage in sorted(lineages.items()):
            self._alike.setdefault(self._digests[run], []).append(lineage)
        self._open: dict[str, _CuratedFile] = {}  # the last used comes last
        self._made = 0

    def __enter__(self) -> CuratedFiles:
        return self

    def add(self, sample: Sample) -> None:
        """Put a sample where its lineage belongs."""
        digest = self._digests[sample.run_id]
        part = self._open.pop(digest, None)
        if part is None:
            if len(self._open) >= MOST_OPEN:
                self._open.pop(next(iter(self._open))).finish()
            part = _CuratedFile(self._folder / f"curated-{self._made:05d}.parquet", self._alike[digest])
            self._made += 1
        self._open[digest] = part
        part.add(sample)

    def __exit__(self, kind: object, *_: object) -> None:
        waiting = list(self._open.values())
        try:
            while kind is None and waiting:
                waiting[0].finish()
                waiting.pop(0)
        finally:
            for part in waiting:
                part.drop()

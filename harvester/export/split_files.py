"""Write exported rows to files by split, under the names that the Hub's readers know.

Files appear under hidden names, and get their own when all rows are written.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.store.shards.parquet_file import BYTES_PER_GROUP, ROWS_PER_GROUP
from harvester.system import output_path

ROWS_PER_FILE = 100_000
_VALIDATION = frozenset({"validation", "valid", "val", "dev", "eval"})


def file_split(named: Any) -> str:
    """Return the split of the file for a row's own split: train, validation, or test for all other names.

    A row that names no split is for training, as the trainer reads it.
    """
    if not isinstance(named, str) or named in {"", "train"}:
        return "train"
    return "validation" if named in _VALIDATION else "test"


class _Files:
    """What both kinds of files share.

    Attributes:
        counts: rows by split.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class JsonlFiles(_Files):
    """One JSON Lines file for each split: train.jsonl, test.jsonl."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self._out = out
        self._files: dict[str, tuple[Path, IO[str]]] = {}

    def add(self, split: str, row: Mapping[str, Any]) -> None:
        """Write a row to the file of its split."""
        if split not in self._files:
            output_path.folder(self._out)
            hidden = self._out / f".{split}.jsonl.tmp"
            self._files[split] = hidden, self._stack.enter_context(hidden.open("w", encoding="utf-8"))
        self._files[split][1].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[split] += 1

    def finish(self) -> tuple[Path, ...]:
        """Give the files their names, and return them, those for training first."""
        paths = []
        for split in sorted(self._files, key=_order):
            hidden, handle = self._files[split]
            handle.close()
            paths.append(hidden.rename(self._out / f"{split}.jsonl"))
        return tuple(paths)


class ParquetFiles(_Files):
    """Parquet files for each split: data/train-00000-of-00001.parquet.

    Args:
        schema: of every file, whatever its rows hold.
    """

    def __init__(self, out: Path, schema: pa.Schema) -> None:
        super().__init__()
        self._data = out / "data"
        self._schema = schema
        self._groups: dict[str, _RowGroup] = {}
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._hidden: dict[str, list[Path]] = {}
        self._rows_in_file: Counter[str] = Counter()

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Add a row to its split; a full row group is written."""
        group = self._groups.setdefault(split, _RowGroup())
        group.add(row)
        self.counts[split] += 1
        if group.is_full:
            self._write(split)

    def finish(self) -> tuple[Path, ...]:
        """Write what is left, give the files their names, and return them, those for training first."""
        paths = []
        for split in sorted(self._groups, key=_order):
            if self._groups[split].rows:
                self._write(split)
            self._close(split)
            hidden = self._hidden[split]
            for number, path in enumerate(hidden):
                name = f"{split}-{number:05d}-of-{len(hidden):05d}.parquet"
                paths.append(path.rename(self._data / name))
        return tuple(paths)

    def _write(self, split: str) -> None:
        rows = self._groups[split].rows
        self._groups[split] = _RowGroup()
        if split not in self._writers:
            output_path.folder(self._data)
            names = self._hidden.setdefault(split, [])
            names.append(self._data / f".{split}-{len(names):05d}.tmp")
            self._writers[split] = self._stack.enter_context(
                pq.ParquetWriter(names[-1], self._schema, compression="zstd", write_page_checksum=True)
            )
        self._writers[split].write_table(pa.Table.from_pylist(rows, schema=self._schema))
        self._rows_in_file[split] += len(rows)
        if self._rows_in_file[split] >= ROWS_PER_FILE:
            self._close(split)

    def _close(self, split: str) -> None:
        writer = self._writers.pop(split, None)
        if writer is not None:
            writer.close()
            self._rows_in_file[split] = 0


class _RowGroup:
    """Rows of one row group; it is full with the row that reaches the limit of rows or size."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._size = 0

    def add(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self.rows.append(row)
        turns: Sequence[Mapping[str, Any]] = list(
            itertools.chain.from_iterable(side for side in row.values() if isinstance(side, list))
        )
        self._size += sum(len(text or "") for turn in turns for text in turn.values())

    @property
    def is_full(self) -> bool:
        """Whether the group is to be written."""
        return len(self.rows) >= ROWS_PER_GROUP or self._size >= BYTES_PER_GROUP


def _order(split: str) -> tuple[bool, str]:
    return split != "train", split

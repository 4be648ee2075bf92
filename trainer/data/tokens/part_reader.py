"""Read rows of the token store by their numbers, counted through all parts. Loads no torch.

Rows are read with `pread`, not through a mapping: a training that walks through hundreds of gigabytes holds
none of them, and a file that was cut meanwhile is an error and not a signal that ends the process.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from trainer.data.chat_template import Example, SparseTargets
from trainer.data.tokens.part import FILES, IDS, ROWS, TEXTS, PartFacts, read_records
from trainer.data.tokens.row_record import RECORD, Records, RowFlag, first_64_bits, full_bytes
from trainer.errors import StoreError

# Parts whose files are open at a time; each has three.
_OPEN_PARTS = 64

RowNumbers = npt.NDArray[np.uint32]


class PartReader:
    """The rows of some parts, one part after the other.

    Attributes:
        facts: of each part.
        first: [parts + 1] int64, number of the first row of each part, and the number of all rows.
    """

    def __init__(self, folders: Sequence[Path], facts: Sequence[PartFacts]) -> None:
        self._folders = tuple(folders)
        self.facts = tuple(facts)
        self.first = np.zeros(len(facts) + 1, dtype=np.int64)
        np.cumsum([part.rows for part in facts], out=self.first[1:])
        self._open: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._kept: list[int] = []
        weakref.finalize(self, _close_parts, self._open, self._kept)

    @classmethod
    def of_part(cls, folder: Path) -> PartReader:
        """Return a reader of a single part that was checked before."""
        return cls([folder], [PartFacts(len(read_records(folder)))])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.first[-1])

    def keep_open(self, handle: int) -> None:
        """Close a handle when this reader goes; -1: there is none."""
        if handle >= 0:
            self._kept.append(handle)

    def folder(self, number: int) -> Path:
        """Return the folder of a part."""
        return self._folders[number]

    def records(self) -> Iterator[tuple[int, int, Records]]:
        """Yield for each part its number, the number of its first row, and its records."""
        for number, folder in enumerate(self._folders):
            yield number, int(self.first[number]), self._translated(folder)

    def column(self, name: str, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """Return one field of all records."""
        values = np.empty(len(self), dtype=dtype or RECORD[name])
        for _, first, records in self.records():
            values[first : first + len(records)] = records[name]
        return values

    def short_keys(self) -> npt.NDArray[np.uint64]:
        """Return the first 64 bits of the keys of all rows."""
        values = np.empty(len(self), dtype=np.uint64)
        for _, first, records in self.records():
            values[first : first + len(records)] = first_64_bits(records["key"], RECORD["key"].itemsize)
        return values

    def gather(self, rows: RowNumbers, name: str) -> npt.NDArray[Any]:
        """Return one field of some rows, in their order."""
        values = np.empty(len(rows), dtype=RECORD[name])
        order = np.argsort(rows, kind="stable")
        bounds = np.searchsorted(rows[order], self.first)
        for number, folder in enumerate(self._folders):
            places = order[bounds[number] : bounds[number + 1]]
            if len(places):
                values[places] = self._translated(folder)[name][rows[places] - self.first[number]]
        return values

    def prompt_ids(self) -> Iterator[tuple[Records, bytes]]:
        """Yield the records of each part, and the prompt ids of its rows one after the other."""
        for number, folder in enumerate(self._folders):
            records = self._translated(folder)
            yield records, self._read(number, TEXTS, 0, int(records["id_bytes"].sum(dtype=np.int64)))

    def record(self, row: int) -> tuple[int, Any]:
        """Return the part of a row, and its record."""
        part = int(np.searchsorted(self.first, row, side="right")) - 1
        data = self._read(part, ROWS, (row - int(self.first[part])) * RECORD.itemsize, RECORD.itemsize)
        return part, np.frombuffer(data, dtype=RECORD)[0]

    def example(self, row: int, weight: float = 1.0) -> Example:
        """Return a row as an example."""
        part, record = self.record(row)
        ids = self.ids_of(part, record).copy()  # torch takes no array that can't be written
        ends = bool(record["flags"] & RowFlag.TERMINATED)
        return Example(ids, int(record["prompt_length"]), ends, weight)

    def ids_of(self, part: int, record: Any) -> npt.NDArray[np.int32]:
        """Return the token ids of a part's row by its record."""
        data = self._read(part, IDS, 4 * int(record["start"]), 4 * int(record["length"]))
        return np.frombuffer(data, dtype=np.int32)

    def prompt_id(self, row: int) -> str:
        """Return the prompt id of a row."""
        return self.prompt_id_of(*self.record(row))

    def prompt_id_of(self, part: int, record: Any) -> str:
        """Return the prompt id of a row whose record was read (`record`)."""
        data = self._read(part, TEXTS, int(record["id_start"]), int(record["id_bytes"]))
        return data.decode("utf-8", "surrogatepass")

    def text(self, row: int) -> str:
        """Return the text of a row: what a held-out prompt asks, as JSON, or why a row is refused."""
        part, record = self.record(row)
        return self._read(part, TEXTS, int(record["text_start"]), int(record["text_bytes"])).decode()

    def digest(self, record: Any, name: str) -> str:
        """Return a hash of a record as hexadecimal digits."""
        return full_bytes(bytes(record[name]), RECORD[name].itemsize).hex()

    def _translated(self, folder: Path) -> Records:
        try:
            return read_records(folder)
        except OSError as error:
            raise unreadable(folder / ROWS, error.strerror or str(error)) from None

    def _read(self, part: int, name: str, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._handles(part)[name], size, offset)
        except OSError as error:
            raise unreadable(self._folders[part] / name, error.strerror or str(error)) from None
        if len(data) != size:
            raise unreadable(self._folders[part] / name, "it is shorter than it was")
        return data

    def _handles(self, part: int) -> dict[str, int]:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        if len(self._open) >= _OPEN_PARTS:
            close_all(self._open.popitem(last=False)[1])
        handles: dict[str, int] = {}
        try:
            for name in FILES:
                handles[name] = os.open(self._folders[part] / name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            close_all(handles)
            raise
        self._open[part] = handles
        return handles


class SoftTargetReader(Protocol):
    """Soft targets of rows, by their place."""

    def of(self, places: Any) -> SoftTargetReader:
        """Return those of some places."""

    def targets(self, place: int) -> SparseTargets | None:
        """Return those of one place; None if it has none."""

    @property
    def places(self) -> npt.NDArray[np.int32]:
        """Places of the rows that have some."""


class StoredExamples(Sequence[Example]):
    """Examples that are read from the token store when they are asked for.

    Args:
        rows: numbers of their rows. weights: of each in the loss; None: all count alike. soft: their soft
            targets; None: they have none.
    """

    def __init__(
        self,
        reader: PartReader,
        rows: RowNumbers,
        weights: npt.NDArray[np.float64] | None = None,
        soft: SoftTargetReader | None = None,
    ) -> None:
        self._reader = reader
        self._rows = rows
        self._weights = weights
        self._soft = soft

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        """Return one example, or the examples of a slice."""
        if isinstance(place, slice):
            weights = None if self._weights is None else self._weights[place]
            soft = None if self._soft is None else self._soft.of(place)
            return StoredExamples(self._reader, self._rows[place], weights, soft)
        weight = 1.0 if self._weights is None else float(self._weights[place])
        example = self._reader.example(int(self._rows[place]), weight)
        soft_targets = None if self._soft is None else self._soft.targets(place)
        return example if soft_targets is None else replace(example, soft=soft_targets)


def close_all(handles: Mapping[Any, int]) -> None:
    """Close open files, by whatever names they are kept."""
    for handle in handles.values():
        os.close(handle)


def _close_parts(parts: dict[int, dict[str, int]], kept: list[int]) -> None:
    for handles in parts.values():
        close_all(handles)
    for handle in kept:
        os.close(handle)


def not_as_written(folder: Path) -> StoreError:
    """Return the error for what was just written and does not read back."""
    return StoreError(
        "the token store reads back other than it was written",
        place=str(folder),
        remedy="check the disk, or set [data] cache to a folder on another one",
    )


def unreadable(path: Path, reason: str) -> StoreError:
    return StoreError(
        f"the token store can't be read: {reason}",
        place=str(path),
        remedy="the same command makes it again; a training resumes from its last checkpoint",
    )

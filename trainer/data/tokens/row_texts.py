"""Keep texts of rows in a temporary file, to be read in another order than they came. Loads no torch."""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from harvester.system import disk_refusal
from trainer.errors import StoreError

# Bytes that are written at a time.
_BUFFER = 1 << 20


class RowTexts:
    """Texts by the place of their row: 12 bytes a row in memory. The file goes with the object, or its block.

    Args:
        folder: in which the file lies, under no name. rows: places there are.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self._folder = folder
        self._starts = np.zeros(rows, dtype=np.int64)
        self._sizes = np.full(rows, -1, dtype=np.int32)
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=_BUFFER)  # noqa: SIM115 - closed below
        except OSError as error:
            raise self._refused(error) from None
        weakref.finalize(self, self._file.close)

    def __enter__(self) -> RowTexts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as refused:  # what was not yet written
            if error is None:
                raise self._refused(refused) from None

    def add(self, place: int, text: bytes) -> None:
        """Add the text of a row.

        Raises:
            StoreFull, StoreError: the disk is full or refuses.
        """
        try:
            self._file.write(text)
        except OSError as error:
            raise self._refused(error) from None
        self._starts[place], self._sizes[place] = self._end, len(text)
        self._end += len(text)

    def read(self, place: int) -> bytes:
        """Return the text of a row.

        Raises:
            KeyError: none was added. StoreFull, StoreError: the disk refuses.
        """
        size = int(self._sizes[place])
        if size < 0:
            raise KeyError(place)
        try:
            self._file.flush()
            data = os.pread(self._file.fileno(), size, int(self._starts[place]))
            if len(data) != size:
                raise OSError(errno.EIO, "the file is shorter than what was written")
        except OSError as error:
            raise self._refused(error) from None
        return data

    def _refused(self, error: OSError) -> StoreError:
        what = "texts of rows can't be kept while they are sorted"
        return disk_refusal.refused(error, what, self._folder, "choose another output folder")


class KeptTexts(Sequence[str]):
    """Texts in a temporary file, read when they are asked for: 12 bytes of each in memory.

    Args:
        folder: in which the file lies, under no name. texts: of which there are `count`.

    Raises:
        StoreFull, StoreError: the disk is full or refuses.
    """

    def __init__(self, folder: Path, texts: Iterable[str], count: int) -> None:
        self._rows = RowTexts(folder, count)
        self._count = count
        for place, text in enumerate(texts):
            self._rows.add(place, text.encode("utf-8", "surrogatepass"))

    def __len__(self) -> int:
        """Return their number."""
        return self._count

    def __getitem__(self, place: Any) -> Any:
        """Return one text, or the texts of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(self._count)[place]]
        return self._rows.read(range(self._count)[place]).decode("utf-8", "surrogatepass")

"""Write and read answers.jsonl: every held-out prompt with the answers of base, student and teacher.

Its lines are read when they are asked for, so a large one takes eight bytes a prompt in memory.
"""

from __future__ import annotations

import io
import json
import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harvester.system import disk_refusal
from trainer.errors import DataError
from trainer.files import write_lines

FILE = "answers.jsonl"

# What `rows_of` needs of a line; earlier versions did not write all of it.
_COLUMNS = ("prompt_id", "task", "tags", "split", "messages", "reference", "base", "student", "teacher")
_REMEDY = "run `trainer evaluate` again, without --judge-only"


def write(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file, completely or not at all.

    Raises:
        StoreFull, StoreError: the disk is full or refuses.
    """
    write_lines(folder / FILE, (json.dumps(row, ensure_ascii=False) for row in rows))


class WrittenAnswers(Sequence[dict[str, Any]]):
    """The lines of answers.jsonl, each read when it is asked for; none without the file.

    Raises:
        DataError: a line, now or when it is read, is not what `write` wrote.
        StoreError: the file can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self._starts = array("q")
        try:
            # One handle for all reads: another evaluation may replace the file meanwhile.
            self._file = self.path.open("rb") if self.path.is_file() else io.BytesIO()
            weakref.finalize(self, self._file.close)
            at = 0
            for line in self._file:
                if line.strip():
                    self._starts.append(at)
                at += len(line)
        except OSError as error:
            raise disk_refusal.refused(error, "can't be read", self.path, "") from None

    def __len__(self) -> int:
        """Return their number."""
        return len(self._starts)

    def __getitem__(self, place: Any) -> Any:
        """Return one line, or the lines of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        number = range(len(self))[place]
        try:
            self._file.seek(self._starts[number])
            row = json.loads(self._file.readline())
        except OSError as error:
            raise disk_refusal.refused(error, "can't be read", self.path, "") from None
        except (ValueError, RecursionError):
            raise self._wrong(number, "is no line of JSON: the file is damaged") from None
        if not isinstance(row, dict):
            raise self._wrong(number, "is no JSON object: the file is damaged")
        if lacking := [name for name in _COLUMNS if name not in row]:
            raise self._wrong(number, f"was written by an earlier version, without {lacking[0]!r}")
        return row

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(what, place=f"{self.path}, answer {number + 1:,}", remedy=_REMEDY)

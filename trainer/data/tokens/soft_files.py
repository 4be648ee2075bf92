"""Keep the soft targets of the rows that are learned in files: computed once, in parallel. Loads no torch.

How a teacher's tokens are mapped depends on all answers together (`soft_targets.choose_mapping`). So all
parts are read once to choose it, and a second time to map their rows, by one process or by several. A file
has the arrays of each row one after the other: student tokens and positions (int32), log-probabilities
(float16).
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harvester.system.files import fsync, sha256_of
from trainer.config import TrainConfig
from trainer.data import array_file
from trainer.data.array_file import ArrayOnDisk
from trainer.data.chat_template import Example, Renderer, SparseTargets
from trainer.data.soft_targets import UNLISTED_ENDS, SoftReport, choose_mapping, share_of_mass
from trainer.data.soft_targets import Path as MappingPath
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import NOTHING, TokenTable
from trainer.data.token_alignment import REASONS
from trainer.data.token_mapping import TokenMapping
from trainer.data.tokens import workers
from trainer.data.tokens.part_reader import PartReader, RowNumbers, close_all, unreadable
from trainer.data.tokens.part_signal import PartSignal
from trainer.data.tokens.row_record import RowFlag
from trainer.model import model

INDEX = "soft.npz"
_INDEX_FIELDS = ("files", "starts", "anchors", "widths")

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ChosenRows:
    """Rows to learn.

    Attributes:
        rows: their numbers, those too long included. fits: [rows] whether each is learned.
    """

    rows: RowNumbers
    fits: npt.NDArray[np.bool_]


class SoftTargetFiles:
    """Soft targets of some rows, read when they are asked for, as is the index that says where they lie.

    Args:
        index: in the folder's `INDEX`: the file of each row, where it lies in it, positions, tokens at each.
        places: of the rows in the index; None: all, in its order.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        index: Mapping[str, ArrayOnDisk],
        places: Numbers | None = None,
    ) -> None:
        self._paths = tuple(paths)
        self._index = index
        self._places = places
        self._handles: dict[Path, int] = {}
        weakref.finalize(self, close_all, self._handles)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._index["starts"].size if self._places is None else len(self._places)

    def of(self, places: Any) -> SoftTargetFiles:
        """Return the soft targets of the rows at some places, of a mask, or of a slice."""
        known = np.arange(len(self), dtype=np.int32) if self._places is None else self._places
        return SoftTargetFiles(self._paths, self._index, known[places])

    @property
    def places(self) -> Numbers:
        """Places of the rows that have soft targets, int32.

        Raises:
            StoreError: the index can't be read any more.
        """
        index = array_file.read(self._paths[0], ("anchors",))
        if index is None:
            raise unreadable(self._paths[0], "it is damaged")
        anchors = index["anchors"] if self._places is None else index["anchors"][self._places]
        return np.flatnonzero(anchors).astype(np.int32)

    def targets(self, place: int) -> SparseTargets | None:
        """Return the soft targets of a row; None if it has none.

        Raises:
            StoreError: the file can't be read.
        """
        at = range(len(self))[place] if self._places is None else int(self._places[place])
        number, start, anchors, width = (self._fact(name, at) for name in _INDEX_FIELDS)
        if not anchors:
            return None
        data = self._read(self._paths[1 + number], start, anchors * (4 + 6 * width))
        # Copies: torch takes no array that can't be written.
        whole = np.frombuffer(data, np.int32, anchors * (width + 1)).copy()
        log_probs = np.frombuffer(data, np.float16, anchors * width, whole.nbytes).copy()
        ids = whole[: anchors * width].reshape(anchors, width)
        return SparseTargets(whole[anchors * width :], ids, log_probs.reshape(anchors, width))

    def _fact(self, name: str, at: int) -> int:
        array = self._index[name]
        data = self._read(self._paths[0], array.offset_of(at), array.dtype.itemsize)
        return int(np.frombuffer(data, array.dtype)[0])

    def _read(self, path: Path, start: int, size: int) -> bytes:
        try:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._handles[path], size, start)
        except OSError as error:
            raise unreadable(path, error.strerror or str(error)) from None
        if len(data) != size:
            raise unreadable(path, "it is shorter than it was")
        return data


def read(folder: Path, files: Mapping[str, str], *, check: bool = True) -> SoftTargetFiles | None:
    """Read the soft targets of a selection, in the order of its chosen rows.

    Args:
        files: SHA-256 by name, as `write` returned them. check: compare it with each file.

    Returns:
        None where something is absent or damaged.
    """
    index = array_file.find(folder / INDEX, _INDEX_FIELDS)
    try:
        if index is None or (check and any(sha256_of(folder / name) != files[name] for name in files)):
            return None
    except OSError:
        return None
    return SoftTargetFiles([folder / name for name in (INDEX, *files)], index)


def write(
    config: TrainConfig,
    renderer: Renderer,
    processes: int,
    reader: PartReader,
    chosen: ChosenRows,
    folder: Path,
) -> tuple[SoftReport, dict[str, str]]:
    """Compute the soft targets of the rows that are learned, and write them.

    Args:
        processes: that map rows. folder: of the selection.

    Returns:
        How much is learned, and the SHA-256 of each file by its name.

    Raises:
        OSError: the disk is full or refuses. ProcessLost: a process was killed.
    """
    survey = _Survey(reader, chosen, StudentTokens(renderer))
    choice = survey.choice()
    tasks = list(survey.learned())
    collected = _Collected(reader, chosen.rows)
    if min(processes, len(tasks)) > 1:
        make = partial(_mapper, config, folder, choice, None)
        for task, result in workers.run(make, tasks, min(processes, len(tasks))):
            collected.add(task, result)
    else:
        do = _mapper(config, folder, choice, renderer)
        for task in tasks:
            collected.add(task, do(task))
    names, index = collected.files()
    array_file.write(folder / INDEX, index)
    for name in names:
        fsync(folder / name)
    mapped = listed = 0.0
    counts = Counter(survey.counts)
    for of_part in collected.in_order():  # in whichever order the parts were mapped, the sums are the same
        mapped, listed = mapped + of_part.mapped, listed + of_part.listed
        counts.update(of_part.counts)
    report = SoftReport(
        choice.path,
        rows=survey.rows,
        rows_without=int(chosen.fits.sum()) - survey.rows,
        supervised=survey.supervised,
        anchors=int(index["anchors"].sum(dtype=np.int64)),
        mapped_mass=share_of_mass(mapped, listed),
        counts=dict(+counts),
        sampling=dict(survey.sampling),
    )
    return report, {name: sha256_of(folder / name) for name in names}


class _Choice(NamedTuple):
    """How teacher tokens are mapped, see `choose_mapping`; `names` are those of the teacher's tokens."""

    path: MappingPath
    names: tuple[tuple[str, bytes | None], ...]
    mapped: Numbers
    ambiguous: frozenset[bytes]


class _Survey:
    """What must be known of all answers before one is mapped.

    Attributes:
        rows, supervised, counts, sampling: see `SoftReport`; of the rows that are learned.
    """

    def __init__(self, reader: PartReader, chosen: ChosenRows, student: StudentTokens) -> None:
        self._reader = reader
        self._student = student
        self._is_chosen = np.zeros(len(reader), dtype=bool)
        self._is_chosen[chosen.rows] = True
        self._is_learned = np.zeros(len(reader), dtype=bool)
        self._is_learned[chosen.rows[chosen.fits]] = True
        self._table = TokenTable()
        self._ends: set[int] = set()
        self._used = np.zeros(len(student.data), dtype=bool)
        self._same_spans = True
        self.rows = self.supervised = 0
        self.counts: Counter[str] = Counter()
        self.sampling: Counter[str] = Counter()
        for number, first, records in reader.records():
            self._add(number, first, records)

    def choice(self) -> _Choice:
        """Choose how teacher tokens are mapped."""
        path, mapped, ambiguous = choose_mapping(
            self._table,
            self._student,
            self._ends,
            lambda: np.flatnonzero(self._used).tolist(),
            same_spans=self._same_spans,
        )
        return _Choice(path, tuple(self._table.names()), mapped, frozenset(ambiguous))

    def learned(self) -> Iterator[_Task]:
        """Yield each part with rows that are learned."""
        for number, (first, end) in enumerate(pairwise(self._reader.first.tolist())):
            is_learned = self._is_learned[first:end]  # no copy
            if is_learned.any():
                yield _Task(number, self._reader.folder(number), is_learned)

    def _add(self, number: int, first: int, records: Any) -> None:
        signal = PartSignal(self._reader.folder(number))
        of_chosen = signal.records[self._is_chosen[first + signal.records["row"]]]
        if not len(of_chosen):
            return
        is_listed = np.zeros(len(signal.names) + 1, dtype=bool)
        itself = np.append(np.arange(len(signal.names), dtype=np.int32), np.int32(NOTHING))
        for answer in signal.answers(of_chosen, itself):
            is_listed[answer.tokens.tokens] = True
        numbers = {int(at): self._table.number(*signal.names[at]) for at in np.flatnonzero(is_listed[:-1])}
        of_learned = of_chosen[self._is_learned[first + of_chosen["row"]]]
        rows = records[of_learned["row"]]
        ends = of_learned["end"]
        self._ends.update(numbers[int(end)] for end in np.unique(ends[ends != NOTHING]))
        self._same_spans = self._same_spans and bool(of_learned["same_spans"].all())
        for reason, count in zip(REASONS, of_learned["reasons"].sum(axis=0).tolist(), strict=True):
            self.counts[reason] += count
        settings, answers = np.unique(of_learned["sampling"], return_counts=True)
        for at, count in zip(settings.tolist(), answers.tolist(), strict=True):
            self.sampling[signal.sampling[at]] += count
        is_ended = (rows["flags"] & RowFlag.TERMINATED) != 0
        is_end_listed = (ends != NOTHING)[is_ended]
        self.counts[UNLISTED_ENDS] += int((~is_end_listed).sum())
        unlisted = len(is_end_listed) * len(self._student.end_of_turn) - int(is_end_listed.sum())
        self.rows += len(rows)
        lengths = rows["length"] - rows["prompt_length"]
        self.supervised += int(lengths.sum(dtype=np.int64)) - unlisted
        for row in rows:
            self._used[self._reader.ids_of(number, row)[int(row["prompt_length"]) :]] = True


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A part: its number and folder, and which of its rows are learned."""

    number: int
    folder: Path
    is_learned: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the rows of a part."""

    mapped: float
    listed: float
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class _Mapped:
    """What was written of a part: its rows with soft targets, and where they are."""

    file: str
    rows: Numbers
    starts: npt.NDArray[np.int64]
    anchors: Numbers
    widths: Numbers
    sums: _Sums


class _Collected:
    """Collect what was written of each part, in any order: 22 bytes a row.

    Args:
        rows: the chosen ones, in the order of the index.
    """

    def __init__(self, reader: PartReader, rows: RowNumbers) -> None:
        self._reader = reader
        self._place_of = np.zeros(len(reader), dtype=np.int32)
        self._place_of[rows] = np.arange(len(rows), dtype=np.int32)
        types = {"files": np.uint16, "starts": np.int64, "anchors": np.int32, "widths": np.int32}
        self._index: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(len(rows), dtype=types[name]) for name in _INDEX_FIELDS
        }
        # The files count from 1 here; rows without soft targets have none.
        self._numbers: dict[str, int] = {}
        self._sums: dict[int, _Sums] = {}

    def add(self, task: _Task, result: _Mapped) -> None:
        """Add the rows of a part."""
        places = self._place_of[int(self._reader.first[task.number]) + result.rows]
        self._index["files"][places] = self._numbers.setdefault(result.file, len(self._numbers) + 1)
        for name in ("starts", "anchors", "widths"):
            self._index[name][places] = getattr(result, name)
        self._sums[task.number] = result.sums

    def files(self) -> tuple[list[str], Mapping[str, npt.NDArray[Any]]]:
        """Return the names of the files, sorted, and the index of all rows."""
        names = sorted(self._numbers)
        number_of = np.zeros(len(names) + 1, dtype=np.uint16)
        number_of[[self._numbers[name] for name in names]] = np.arange(len(names))
        return names, {**self._index, "files": number_of[self._index["files"]]}

    def in_order(self) -> Iterator[_Sums]:
        """Yield the sums of the parts in their order."""
        for _, sums in sorted(self._sums.items()):
            yield sums


def _mapper(
    config: TrainConfig, folder: Path, choice: _Choice, renderer: Renderer | None
) -> Callable[[_Task], _Mapped]:
    """Return what maps the rows of parts; each process has its own file."""
    renderer = renderer or Renderer(model.load_tokenizer(config.base, config.template))
    return _Mapper(folder / f"soft-{os.getpid()}.bin", choice, StudentTokens(renderer)).write


class _Mapper:
    """Map the rows of parts and append them to a file."""

    def __init__(self, path: Path, choice: _Choice, student: StudentTokens) -> None:
        self._path = path
        path.open("xb").close()
        self._table = TokenTable()
        for name in choice.names:
            self._table.number(*name)
        self._counts: Counter[str] = Counter()
        ambiguous = set(choice.ambiguous)
        self._mapping = TokenMapping(self._table, student, choice.mapped, ambiguous, self._counts)

    def write(self, task: _Task) -> _Mapped:
        """Append the soft targets of a part's rows."""
        self._counts.clear()
        self._mapping.mapped = self._mapping.listed = 0.0
        signal = PartSignal(task.folder)
        numbers = np.array([self._table.find(*name) for name in signal.names] + [NOTHING], dtype=np.int32)
        wanted = signal.records[task.is_learned[signal.records["row"]]]
        rows, starts, anchors, widths = [], [], [], []
        reader = PartReader.of_part(task.folder)
        at = self._path.stat().st_size
        with self._path.open("ab") as file:
            answers = signal.answers(wanted, numbers)
            for row, answer in zip(wanted["row"].tolist(), answers, strict=True):
                example: Example = reader.example(row)
                soft = self._mapping.targets(example, answer.tokens, answer.alignment)
                if soft is None:
                    continue
                rows.append(row)
                starts.append(at)
                anchors.append(len(soft.positions))
                widths.append(soft.ids.shape[1])
                for array in (soft.ids, soft.positions, soft.log_probs):
                    at += file.write(array.tobytes())
        return _Mapped(
            self._path.name,
            np.array(rows, dtype=np.int32),
            np.array(starts, dtype=np.int64),
            np.array(anchors, dtype=np.int32),
            np.array(widths, dtype=np.int32),
            _Sums(self._mapping.mapped, self._mapping.listed, Counter(self._counts)),
        )

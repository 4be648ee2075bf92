"""Give the rows of a token store in the form that a training, its documents and the doctor ask for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.data import row_rules
from trainer.data.chat_template import ROLES_REMEDY, Example, Renderer
from trainer.data.conversation import Conversation
from trainer.data.data_checks import RenderedRows, RowKinds
from trainer.data.held_out import HeldOut
from trainer.data.tokens.part_reader import PartReader, RowNumbers, SoftTargetReader, StoredExamples
from trainer.data.tokens.row_record import RowFlag
from trainer.errors import StudentError
from trainer.provenance.fingerprint import Leaf


class StoredHeldOut(Sequence[HeldOut]):
    """Held-out prompts that are read when they are asked for; the teacher's further answers are left out.

    Args:
        rows: numbers of their rows.
    """

    def __init__(self, reader: PartReader, rows: RowNumbers) -> None:
        self._reader = reader
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        """Return one prompt, or the prompts of a slice."""
        if isinstance(place, slice):
            return StoredHeldOut(self._reader, self._rows[place])
        row = int(self._rows[place])
        asked = json.loads(self._reader.text(row))
        return HeldOut(
            self._reader.prompt_id(row),
            Conversation(tuple(asked["messages"]), tuple(asked["tools"])),
            asked["reference"],
            asked["task"],
            asked["split"],
            asked["teacher"],
        )


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The corpus split into rows to learn and held-out prompts, as `dataset.Rows`, but read when asked for.

    Attributes:
        chosen: numbers of the rows to learn, those too long included, by prompt id, sample number and key.
        held_out_rows: numbers of the held-out prompts.
        counts: rows to learn by (teacher, terms, mock).
        mixed: as of `dataset.Rows`.
    """

    reader: PartReader
    chosen: RowNumbers
    held_out_rows: RowNumbers
    lineages: tuple[Lineage, ...]
    counts: Mapping[tuple[str, str, bool], int]
    mixed: tuple[str, ...] = ()

    @property
    def held_out(self) -> Sequence[HeldOut]:
        """Prompts kept for evaluation."""
        return StoredHeldOut(self.reader, self.held_out_rows)

    @property
    def answered(self) -> Sequence[HeldOut]:
        """Held-out prompts to which the teacher has a usable answer."""
        flags = self.reader.gather(self.held_out_rows, "flags")
        return StoredHeldOut(self.reader, self.held_out_rows[(flags & RowFlag.ANSWERED) != 0])

    @property
    def learned(self) -> int:
        """Number of the rows to learn, those too long included."""
        return len(self.chosen)

    def teachers(self) -> Mapping[tuple[str, str, bool], int]:
        """Return the number of rows by teacher, terms record and whether the teacher is a mock."""
        return self.counts

    def leaves(self) -> Iterator[Leaf]:
        """Yield the leaves of the rows to learn, in the order of the hash tree."""
        # Stable, so rows with one key stay in order of prompt id and sample number.
        order = np.argsort(self.reader.gather(self.chosen, "key"), kind="stable")
        for row in self.chosen[order]:
            yield self._leaf(int(row))

    def _leaf(self, row: int) -> Leaf:
        part, record = self.reader.record(row)
        key, completion, origin = (
            self.reader.digest(record, name) for name in ("key", "completion", "origin")
        )
        return Leaf(
            key, completion, origin, self.reader.prompt_id_of(part, record), int(record["sample_index"])
        )

    def first(self, count: int) -> StoredRows:
        """Return the first rows only."""
        chosen = self.chosen[:count]
        counts: Counter[tuple[str, str, bool]] = Counter()
        for row in chosen:
            part, record = self.reader.record(int(row))
            counts[self.reader.facts[part].teachers[record["teacher"]]] += 1
        return StoredRows(self.reader, chosen, self.held_out_rows[:0], self.lineages, counts, self.mixed)

    def only(self, places: npt.NDArray[np.int32]) -> StoredRows:
        """Return the rows at some places only."""
        chosen = self.chosen[places]
        return replace(self, chosen=chosen, counts=teachers_of(self.reader, chosen))

    def held_out_examples(self, renderer: Renderer, config: TrainConfig) -> Sequence[Example]:
        """Return the teacher's held-out answers, those that are not too long.

        Raises:
            StudentError: the chat template refuses a held-out prompt.
        """
        flags = self.reader.gather(self.held_out_rows, "flags")
        refused = self.held_out_rows[(flags & RowFlag.REFUSED) != 0]
        if len(refused):
            raise StudentError(
                self.reader.text(int(refused[0])),
                place=str(config.base),
                remedy=ROLES_REMEDY,
            )
        return StoredExamples(self.reader, self.held_out_rows[self.are_targets(config)])

    def are_targets(self, config: TrainConfig) -> npt.NDArray[np.bool_]:
        """Return which held-out prompts have an answer of the teacher that is whole and not too long."""
        flags = self.reader.gather(self.held_out_rows, "flags")
        lengths = self.reader.gather(self.held_out_rows, "length")
        return np.asarray(((flags & RowFlag.RENDERED) != 0) & (lengths <= row_rules.longest_row(config)))


@dataclass(frozen=True, slots=True)
class StoredRendered:
    """All rows to learn as examples, those too long included, for the doctor's page.

    Attributes:
        examples: of the rows, in the order of `StoredRows.chosen`.
        soft: their soft targets; None: they have none.
    """

    rows: StoredRows
    examples: Sequence[Example]
    of_kinds: RowKinds
    soft: SoftTargetReader | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows.chosen)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """[rows] int32, tokens of each row."""
        return self.rows.reader.column("length")[self.rows.chosen]

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """[rows] int32, supervised tokens of each row."""
        prompts = self.rows.reader.column("prompt_length")[self.rows.chosen]
        return np.asarray(self.lengths - prompts)

    @property
    def with_soft_targets(self) -> npt.NDArray[np.int32]:
        """Places of the rows that have soft targets."""
        return np.zeros(0, dtype=np.int32) if self.soft is None else self.soft.places

    def prompt_id(self, number: int) -> str:
        """Return the prompt id of a row."""
        return self.rows.reader.prompt_id(int(self.rows.chosen[number]))

    def kinds(self) -> RowKinds:
        """Count rows of the kinds that the doctor mentions."""
        return self.of_kinds


def teachers_of(reader: PartReader, rows: RowNumbers) -> Counter[tuple[str, str, bool]]:
    """Count rows by teacher, terms record and whether the teacher is a mock."""
    is_chosen = mask_of(reader, rows)
    counts: Counter[tuple[str, str, bool]] = Counter()
    for number, first, records in reader.records():
        teachers = reader.facts[number].teachers
        chosen = records["teacher"][is_chosen[first : first + len(records)]]
        counts.update(dict(zip(teachers, np.bincount(chosen, minlength=len(teachers)).tolist(), strict=True)))
    return +counts


def mask_of(reader: PartReader, rows: RowNumbers) -> npt.NDArray[np.bool_]:
    """Return for all rows of a store whether they are among some."""
    mask = np.zeros(len(reader), dtype=bool)
    mask[rows] = True
    return mask


# Rows to learn with their examples, in memory or in a store.
Rendered = RenderedRows | StoredRendered

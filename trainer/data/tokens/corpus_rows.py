"""Read from the corpus what the token store does not keep of its rows: their texts. Loads no torch.

Rows are found by the hash of their request, so of a shard only the row groups that have one of them are read
beyond that column, and only the rows that are asked for become objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harvester.quality.similarity.split import prompt_key
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.conversation import request_beyond_columns
from trainer.data.dataset import HeldOut
from trainer.data.tokens.part_reader import PartReader, RowNumbers
from trainer.data.tokens.row_record import RowFlag
from trainer.data.tokens.stored_rows import StoredRows
from trainer.errors import DataError

# What tells the rows of one answer apart, which several prompts may share.
_Identity = tuple[str, str, int]
_IDENTITY = ("key", "prompt_id", "sample_index")
_TEXTS = (*_IDENTITY, "messages", "completion", "reasoning", "request_json")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The condition that a row is one of those asked for; see `harvester.store.reader.RowFilter`."""

    places: Mapping[_Identity, list[int]]

    @property
    def columns(self) -> Sequence[str]:
        return _IDENTITY

    @property
    def required_texts(self) -> Mapping[str, Collection[str]]:
        return {"key": {key for key, _, _ in self.places}}

    def matches(self, sample: Sample) -> bool:
        return _identity(sample) in self.places


def _identity(sample: Sample) -> _Identity:
    return sample.key, sample.prompt_id, sample.sample_index


def read_samples(
    config: TrainConfig, reader: PartReader, rows: RowNumbers, columns: Sequence[str] = _TEXTS
) -> Iterator[tuple[int, Sample]]:
    """Yield rows of the token store as the corpus has them, in the corpus's order.

    Args:
        rows: numbers of rows. columns: that are filled.

    Yields:
        The place of each row in `rows`, and the row.

    Raises:
        DataError: the corpus lacks one of them by now.
    """
    places: dict[_Identity, list[int]] = {}
    for place in np.argsort(rows, kind="stable").tolist():
        part, record = reader.record(int(rows[place]))
        identity = (
            reader.digest(record, "key"),
            reader.prompt_id_of(part, record),
            int(record["sample_index"]),
        )
        places.setdefault(identity, []).append(place)
    left = len(rows)
    wanted = list(dict.fromkeys([*_IDENTITY, *columns]))
    for sample in Corpus.open(config.corpus).samples(wanted, where=_Wanted(places)) if left else ():
        if of_sample := places[_identity(sample)]:
            left -= 1
            yield of_sample.pop(0), replace(sample, request_json=request_beyond_columns(sample))
    if left:
        raise DataError(
            f"{left:,} rows of the corpus went while it was read",
            place=str(config.corpus),
            remedy="try again when nothing changes the corpus",
        )


def held_out_prompts(config: TrainConfig, rows: StoredRows) -> tuple[HeldOut, ...]:
    """Return the held-out prompts as `dataset.read` does, each with all of the teacher's answers.

    Raises:
        DataError: the corpus is not the one that was tokenised any more.
    """
    reader = rows.reader
    is_held_out = RowFlag.HELD_OUT | RowFlag.TEXT
    numbers = np.flatnonzero((reader.column("flags") & is_held_out) == is_held_out).astype(np.uint32)
    read: list[Sample | None] = [None] * len(numbers)
    for place, sample in read_samples(config, reader, numbers, dataset.COLUMNS_AND_REQUEST):
        read[place] = sample
    # Stable, so rows that are alike stay in the order of the corpus.
    samples = sorted(
        (sample for sample in read if sample is not None), key=lambda s: (s.prompt_id, s.sample_index, s.key)
    )
    splits = [dataset.split_of(sample, prompt_key(sample.messages), config.data) for sample in samples]
    held_out = dataset.held_out_prompts(samples, splits, config.data)
    tokenised = [reader.prompt_id(int(row)) for row in rows.held_out_rows]
    if [held.prompt_id for held in held_out] != tokenised:
        raise DataError(
            "the held-out prompts are not those that were tokenised",
            place=str(config.corpus),
            remedy="try again when nothing changes the corpus",
        )
    return held_out

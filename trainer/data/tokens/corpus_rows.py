"""Read from the corpus what the token store does not keep of its rows: their texts. Loads no torch.

Rows are found by the hash of their request, so of a shard only the row groups that have one of them are read
beyond that column, and only the rows that are asked for become objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harvester.quality.held_out import prompt_key
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from trainer.config import TrainConfig
from trainer.data import dataset, row_rules
from trainer.data.conversation import request_beyond_columns
from trainer.data.held_out import HeldOut, prompts_of_samples
from trainer.data.tokens.held_out_texts import HeldOutTexts
from trainer.data.tokens.part_reader import PartReader, RowNumbers
from trainer.data.tokens.row_record import RowFlag
from trainer.data.tokens.selection import ids_and_contents
from trainer.data.tokens.stored_rows import StoredRows
from trainer.errors import DataError

# What tells the rows of one answer apart, which several prompts may share.
_Identity = tuple[str, str, int]
_IDENTITY = ("key", "prompt_id", "sample_index")
# Held-out rows that are looked for in the corpus by their keys; where there are more, all of it is read.
_FEW_ROWS = 1 << 12
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
        places.setdefault(_stored_identity(reader, int(rows[place])), []).append(place)
    left = len(rows)
    wanted = list(dict.fromkeys([*_IDENTITY, *columns]))
    for sample in Corpus.open(config.corpus).samples(wanted, where=_Wanted(places)) if left else ():
        if of_sample := places[_identity(sample)]:
            left -= 1
            yield of_sample.pop(0), replace(sample, request_json=request_beyond_columns(sample))
    _require_all(config, left)


def _require_all(config: TrainConfig, left: int) -> None:
    if left:
        raise DataError(
            f"{left:,} rows of the corpus went while it was read",
            place=str(config.corpus),
            remedy="try again when nothing changes the corpus",
        )


def stream_samples(
    config: TrainConfig, reader: PartReader, rows: RowNumbers, columns: Sequence[str] = _TEXTS
) -> Iterator[tuple[int, Sample]]:
    """Yield what `read_samples` does, in the same order, for rows that are most of the corpus.

    All of the corpus is read. Of the rows only 13 bytes each are held.

    Raises:
        DataError: the corpus lacks one of them by now.
    """
    finder = _Finder(reader, rows)
    left = len(rows)
    wanted = list(dict.fromkeys([*_IDENTITY, *columns]))
    for sample in Corpus.open(config.corpus).samples(wanted):
        place = finder.take(sample)
        if place is not None:
            left -= 1
            yield place, replace(sample, request_json=request_beyond_columns(sample))
    _require_all(config, left)


class _Finder:
    """Find samples among rows of a token store; each row is found once.

    Args:
        rows: numbers of rows.
    """

    def __init__(self, reader: PartReader, rows: RowNumbers) -> None:
        self._reader = reader
        self._rows = rows
        # Stable sorts: rows that are alike are found in the order of the corpus.
        order = np.argsort(rows, kind="stable").astype(np.int32)
        keys = reader.short_keys()[rows[order]]
        by_key = np.argsort(keys, kind="stable")
        self._keys = keys[by_key]
        self._places = order[by_key]
        self._is_taken = np.zeros(len(rows), dtype=bool)

    def take(self, sample: Sample) -> int | None:
        """Return the place of a sample among the rows; None if it has none, or was found before."""
        key = np.frombuffer(bytes.fromhex(sample.key), dtype=np.uint64, count=1)[0]
        for at in range(*(int(np.searchsorted(self._keys, key, side)) for side in ("left", "right"))):
            place = int(self._places[at])
            if not self._is_taken[place] and _stored_identity(
                self._reader, int(self._rows[place])
            ) == _identity(sample):
                self._is_taken[place] = True
                return place
        return None


def _stored_identity(reader: PartReader, row: int) -> _Identity:
    part, record = reader.record(row)
    return reader.digest(record, "key"), reader.prompt_id_of(part, record), int(record["sample_index"])


def held_out_prompts(config: TrainConfig, rows: StoredRows, folder: Path) -> Sequence[HeldOut]:
    """Return the held-out prompts as `dataset.read` does, each with all of the teacher's answers.

    They are read from the corpus once, and then from a temporary file.

    Args:
        folder: in which the file lies, under no name.

    Raises:
        DataError: the corpus is not the one that was tokenised any more.
        StoreFull, StoreError: the disk is full or refuses.
    """
    reader = rows.reader
    is_held_out = RowFlag.HELD_OUT | RowFlag.TEXT
    numbers = np.flatnonzero((reader.column("flags") & is_held_out) == is_held_out).astype(np.uint32)
    if not len(numbers) and not len(rows.held_out_rows):
        return ()
    # The place of each row's prompt among the held-out ones, by the hashes of its id and content.
    ids, firsts = (ids_and_contents(reader, each) for each in (numbers, rows.held_out_rows))
    by_id = np.argsort(firsts, kind="stable")
    found = np.minimum(np.searchsorted(firsts[by_id], ids), max(len(firsts) - 1, 0))
    if not len(firsts) or (firsts[by_id][found] != ids).any():
        raise _other_prompts(config)
    rank = by_id[found]
    # Stable, so rows that are alike stay in the order of the corpus.
    order = np.lexsort((reader.gather(numbers, "key"), reader.gather(numbers, "sample_index"), rank))
    bounds = np.searchsorted(rank[order], np.arange(len(firsts) + 1))
    held_out = HeldOutTexts(folder, order, bounds)
    read = read_samples if len(numbers) <= _FEW_ROWS else stream_samples
    for place, sample in read(config, reader, numbers, dataset.COLUMNS_AND_REQUEST):
        split = row_rules.split_of(sample, prompt_key(sample.messages), config.data)
        of_row = prompts_of_samples([sample], [split], config.data)
        if not of_row:
            raise _other_prompts(config)
        held_out.add(place, of_row[0])
    return held_out


def _other_prompts(config: TrainConfig) -> DataError:
    return DataError(
        "the held-out prompts are not those that were tokenised",
        place=str(config.corpus),
        remedy="try again when nothing changes the corpus",
    )

"""Give the rows of an audit: those of a small corpus from memory, those of a large one from its token store.

Of a large corpus neither rows nor ids are held: what an audit asks for is read anew each time.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harvester.quality.held_out import prompt_key
from harvester.store.shards.schema import Sample
from trainer.config import TrainConfig
from trainer.data import data_checks, dataset, published_template, row_rules
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import Rows
from trainer.data.tokens import builder, corpus_rows, part_of_store
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.part_reader import RowNumbers, StoredExamples
from trainer.data.tokens.row_record import RECORD
from trainer.data.tokens.token_store import TokenStore
from trainer.model import weights

Places = NDArray[np.integer[Any]] | Sequence[int]
# The first 16 bytes of the SHA-256 of each row's prompt (`prompt_key`).
Prompts = NDArray[np.bytes_]


class AuditedRows(Protocol):
    """The rows that can be learned, by their place, in order of prompt id, sample number and key."""

    @property
    def examples(self) -> Sequence[Example]:
        """The rows as examples."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def prompts(self) -> Prompts:
        """Return the first 16 bytes of the hash of each row's prompt."""

    def keys(self, places: Places) -> NDArray[np.bytes_]:
        """Return the keys of some rows, 32 bytes each."""

    def names(self, place: int) -> tuple[str, str]:
        """Return key and prompt id of a row."""

    def samples(self, places: Places | None = None) -> Iterator[tuple[int, Sample]]:
        """Yield some rows with their texts, or all, in any order, each with its place."""

    def without(
        self, is_held: NDArray[np.bool_], part: TrainConfig
    ) -> contextlib.AbstractContextManager[Rows | TokenStore]:
        """Give what a student learns from that shall not see some rows.

        Args:
            is_held: whether each row is kept from it. part: its configuration.
        """


def read(config: TrainConfig, renderer: Renderer, on_progress: Progress = no_progress) -> AuditedRows:
    """Read the corpus, or its token store where it is large.

    Args:
        on_progress: called while a token store is made, because there is none.

    Raises:
        What `dataset.read` and `builder.prepare` raise.
    """
    if dataset.is_stored(config):
        return RowsOfStore(config, renderer, builder.prepare(config, renderer, on_progress))
    rows = dataset.read(config, learns=False)
    rendered = dataset.render_samples(rows.train, renderer, config.data)
    most = row_rules.longest_row(config)
    pairs = [
        (sample, example)
        for sample, example in zip(rows.train, rendered, strict=True)
        if len(example.ids) <= most and example.supervised > 0
    ]
    return RowsInMemory([sample for sample, _ in pairs], [example for _, example in pairs])


class RowsInMemory:
    """The rows of a small corpus.

    Args:
        samples: rows. examples: the same, rendered.
    """

    def __init__(self, samples: Sequence[Sample], examples: Sequence[Example]) -> None:
        self._samples = samples
        self._examples = examples

    @property
    def examples(self) -> Sequence[Example]:
        """The rows as examples."""
        return self._examples

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._samples)

    def prompts(self) -> Prompts:
        """Return the first 16 bytes of the hash of each row's prompt."""
        hashes = [bytes.fromhex(prompt_key(sample.messages))[:16] for sample in self._samples]
        return np.array(hashes, dtype=RECORD["prompt"])

    def keys(self, places: Places) -> NDArray[np.bytes_]:
        """Return the keys of some rows, 32 bytes each."""
        return np.array([bytes.fromhex(self._samples[place].key) for place in places], dtype=RECORD["key"])

    def names(self, place: int) -> tuple[str, str]:
        """Return key and prompt id of a row."""
        return self._samples[place].key, self._samples[place].prompt_id

    def samples(self, places: Places | None = None) -> Iterator[tuple[int, Sample]]:
        """Yield some rows, or all, each with its place."""
        for place in range(len(self)) if places is None else places:
            yield int(place), self._samples[place]

    @contextlib.contextmanager
    def without(self, is_held: NDArray[np.bool_], part: TrainConfig) -> Iterator[Rows]:
        """Read the corpus again, without some rows of the training split."""
        others = {sample.key for sample, held in zip(self._samples, is_held, strict=True) if not held}
        yield dataset.read(part, only=others, learns=False)


class RowsOfStore:
    """The rows of a large corpus: ids are read from the token store, and texts from the corpus."""

    def __init__(self, config: TrainConfig, renderer: Renderer, store: TokenStore) -> None:
        reader, chosen = store.rows.reader, store.rows.chosen
        lengths = reader.column("length")[chosen]
        fits = (lengths <= row_rules.longest_row(config)) & (lengths > reader.column("prompt_length")[chosen])
        self._config = config
        self._renderer = renderer
        self._store = store
        self._reader = reader
        self._rows: RowNumbers = chosen if fits.all() else chosen[fits]

    @property
    def examples(self) -> Sequence[Example]:
        """The rows as examples, read when they are asked for; weights and soft targets are left out."""
        return StoredExamples(self._reader, self._rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def prompts(self) -> Prompts:
        """Return the first 16 bytes of the hash of each row's prompt."""
        return self._reader.gather(self._rows, "prompt")

    def keys(self, places: Places) -> NDArray[np.bytes_]:
        """Return the keys of some rows, 32 bytes each."""
        return self._reader.gather(self._rows[places], "key")

    def names(self, place: int) -> tuple[str, str]:
        """Return key and prompt id of a row."""
        part, record = self._reader.record(int(self._rows[place]))
        return self._reader.digest(record, "key"), self._reader.prompt_id_of(part, record)

    def samples(self, places: Places | None = None) -> Iterator[tuple[int, Sample]]:
        """Yield some rows as the corpus has them, or all, in its order, each with its place.

        Raises:
            DataError: the corpus lacks one of them by now.
        """
        if places is None:
            yield from corpus_rows.stream_samples(
                self._config, self._reader, self._rows, dataset.COLUMNS_AND_REQUEST
            )
            return
        for at, sample in corpus_rows.read_samples(
            self._config, self._reader, self._rows[places], dataset.COLUMNS_AND_REQUEST
        ):
            yield int(places[at]), sample

    @contextlib.contextmanager
    def without(self, is_held: NDArray[np.bool_], part: TrainConfig) -> Iterator[TokenStore]:
        """Choose among the rows of the token store anew, as if some of the training split were not there."""
        folder = part.out_path.with_name(f".{part.out_path.name}.rows")
        keeps_reasoning = published_template.keeps_reasoning(part, self._renderer)
        vocabulary = weights.vocabulary_size(part.base)
        checker = data_checks.RowChecker(self._renderer, vocabulary, keeps_reasoning=keeps_reasoning)
        try:
            yield part_of_store.choose(self._store, part, checker.names, folder, self._rows[~is_held])
        finally:
            shutil.rmtree(folder, ignore_errors=True)

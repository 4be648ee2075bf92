"""Learn the rows of a token store in an experiment: hash them as rows in memory are hashed, holding none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from trainer.config import TrainConfig
from trainer.data import answers, dataset
from trainer.data.chat_template import Renderer
from trainer.data.held_out import HeldOut
from trainer.data.tokens import builder, corpus_rows, selection
from trainer.data.tokens.row_texts import RowTexts
from trainer.data.tokens.token_store import TokenStore
from trainer.evaluation.scorecard import HEADLINE_SPLIT
from trainer.experiments.trainings import (
    Display,
    Trainings,
    held_out_sha256,
    require_held_out,
    row_line,
)
from trainer.model import model

# Weights that exist as text at a time.
_AT_ONCE = 1 << 16


class TaughtStore:
    """All rows of a large corpus, which a training learns.

    Args:
        config: of the training. store: of its corpus.
        folder: for the texts of the rows while they are sorted.
    """

    def __init__(self, config: TrainConfig, store: TokenStore, folder: Path) -> None:
        self.store = store
        self._config = config
        self._folder = folder

    def sha256(self) -> str:
        """Return what `trainings.rows_sha256` does for the rows as `dataset.read` gives them.

        Raises:
            DataError: the corpus has changed. StoreFull, StoreError: the disk is full or refuses.
        """
        rows = self.store.rows
        hashed = hashlib.sha256()
        for text in self._weights():
            hashed.update(text.encode())
        with RowTexts(self._folder, len(rows.chosen)) as lines:
            columns = dataset.COLUMNS_AND_REQUEST
            for place, sample in corpus_rows.stream_samples(self._config, rows.reader, rows.chosen, columns):
                lines.add(place, row_line(sample))
            for place in range(len(rows.chosen)):
                hashed.update(lines.read(place))
        return hashed.hexdigest()

    def held_out_sha256(self) -> str:
        """Return the hash of the held-out prompts that choose an adapter, those of one split.

        Raises:
            DataError: the corpus has changed.
        """
        splits = {held.split for held in self.store.rows.held_out}
        split = HEADLINE_SPLIT if HEADLINE_SPLIT in splits else min(splits, default="")
        return held_out_sha256(held for held in self._held_out() if held.split == split)

    def _held_out(self) -> Iterator[HeldOut]:
        yield from corpus_rows.held_out_prompts(self._config, self.store.rows, self._folder)

    def _weights(self) -> Iterator[str]:
        """Yield the tuple of the rows' weights as Python writes it, piece by piece."""
        weights = None
        if answers.compares_answers(self._config.data):
            weights = selection.select(self.store.rows.reader, self._config.data).weights
        if weights is None or not len(weights):
            yield "()"
            return
        yield "("
        for begin in range(0, len(weights), _AT_ONCE):
            yield ", " * (begin > 0) + ", ".join(map(repr, weights[begin : begin + _AT_ONCE].tolist()))
        yield ",)" if len(weights) == 1 else ")"


def trainings_of_store(config: TrainConfig, folder: Path, display: Display) -> tuple[Trainings, TaughtStore]:
    """Return what trains on a large corpus, and its rows; the token store is made where there is none.

    Raises:
        DataError: no prompt is held out, as `Stages` raises it; and what `builder.prepare` raises.
    """
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    store = builder.prepare(config, renderer, display.progress)
    require_held_out(store.rows.held_out, config)
    rows = TaughtStore(config, store, folder)
    return Trainings(config, folder, rows.held_out_sha256, display), rows

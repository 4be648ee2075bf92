"""Divide a corpus into the parts of a token store, and read and render one of them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from harvester.store.reader import UNSEALED_ROWS, Corpus
from harvester.store.shards.schema import Sample, to_table
from harvester.store.view import CorpusView, ShardEntry
from harvester.system.files import sha256_of
from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.dataset import LOGPROB_COLUMNS
from trainer.data.teacher_tokens import TeacherSignal, read_signal
from trainer.data.tokens import part, store_names
from trainer.data.tokens.part_renderer import PartRenderer
from trainer.model import model, weights

# Rows of a part, at most, unless a row group has more. A kill costs the parts that are being rendered.
PART_ROWS = 1 << 14
# The same with log-probabilities, which may have some hundred times the bytes of a row's text.
SIGNAL_PART_ROWS = 1 << 11


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows of a corpus that make one part.

    Attributes:
        name: of the part's folder.
        rows: rows in it, about: prompts that share an answer are not counted.
        entry: the shard; None for the answers that are not sealed yet.
        groups: row groups of the shard.
        asks_sha256: see `CorpusView`.
    """

    name: str
    rows: int
    entry: ShardEntry | None = None
    groups: range = range(0)
    asks_sha256: str = ""


def units_of(corpus: Corpus, view: CorpusView, *, has_signal: bool) -> Iterator[Unit]:
    """Yield the parts of a corpus in the order of its rows: unsealed answers first.

    Args:
        has_signal: whether log-probabilities are read.
    """
    most_rows = min(PART_ROWS, SIGNAL_PART_ROWS) if has_signal else PART_ROWS
    if view.tail_sha256:
        name = store_names.part_name(view.tail_sha256, view.asks_sha256)
        yield Unit(name, view.unsealed_rows)
    for entry in view.manifest:
        digest = entry.sha256 or sha256_of(corpus.folder / entry.name)
        for groups, rows in corpus.parts(entry, most_rows):
            name = store_names.part_name(digest, groups.start, groups.stop, view.asks_sha256)
            yield Unit(name, rows, entry, groups, view.asks_sha256)


class UnitRenderer:
    """Read units of a corpus and write them as parts; each process has its own.

    Args:
        parts: the folder of the parts.
    """

    def __init__(self, config: TrainConfig, parts: Path, renderer: Renderer | None = None) -> None:
        self._parts = parts
        self._corpus = Corpus.open(config.corpus)
        renderer = renderer or Renderer(model.load_tokenizer(config.base, config.template))
        self._renderer = PartRenderer(config, renderer, weights.vocabulary_size(config.base))
        self._has_signal = config.train.soft_targets != "off"

    @property
    def fault_names(self) -> tuple[str, ...]:
        """Faults that a row can have, in the order of the bits."""
        return self._renderer.fault_names

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the corpus that are read of each row, without log-probabilities."""
        return self._renderer.columns

    @property
    def tail_columns(self) -> tuple[str, ...]:
        """Columns that are read of the unsealed answers."""
        return tuple(dict.fromkeys((*self.columns, *(LOGPROB_COLUMNS if self._has_signal else ()))))

    def write(self, unit: Unit, view: CorpusView | None = None) -> None:
        """Render a unit and write its part.

        Args:
            view: the snapshot, which has the unsealed answers.
        """
        signal = TeacherSignal() if self._has_signal else None
        if unit.entry is None:
            assert view is not None, "only the process that holds the snapshot reads unsealed answers"
            samples = view.unsealed if signal is None else _without_log_probs(view.unsealed, signal)
        else:
            if signal is not None:
                batches = self._corpus.part_batches(unit.entry, unit.groups, LOGPROB_COLUMNS)
                signal = read_signal(batches)
            samples = self._corpus.part(unit.entry, unit.groups, self.columns, unit.asks_sha256)
        part.write(self._parts / unit.name, self._renderer.render(samples, signal))


def _without_log_probs(samples: Iterator[Sample], signal: TeacherSignal) -> Iterator[Sample]:
    """Yield samples without their log-probabilities, which go to `signal`: as objects they are far larger."""
    while few := list(islice(samples, UNSEALED_ROWS)):
        for batch in to_table(few).select(LOGPROB_COLUMNS).to_batches():
            signal.add(batch)
        yield from (replace(sample, logprobs=None) for sample in few)

"""Divide a corpus into the parts of a token store, and read and render one of them. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harvester.store.reader import Corpus
from harvester.store.view import CorpusView, ShardEntry
from harvester.system.files import sha256_of
from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.tokens import address, part
from trainer.data.tokens.part_renderer import PartRenderer
from trainer.model import model, weights

# Rows of a part, at most, unless a row group has more. A kill costs the parts that are being rendered.
PART_ROWS = 1 << 14


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


def units_of(corpus: Corpus, view: CorpusView) -> Iterator[Unit]:
    """Yield the parts of a corpus in the order of its rows: unsealed answers first."""
    if view.tail_sha256:
        name = address.part_name(view.tail_sha256, view.asks_sha256)
        yield Unit(name, view.unsealed_rows)
    for entry in view.manifest:
        digest = entry.sha256 or sha256_of(corpus.folder / entry.name)
        for groups, rows in corpus.parts(entry, PART_ROWS):
            name = address.part_name(digest, groups.start, groups.stop, view.asks_sha256)
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

    @property
    def fault_names(self) -> tuple[str, ...]:
        """Faults that a row can have, in the order of the bits."""
        return self._renderer.fault_names

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the corpus that are read."""
        return self._renderer.columns

    def write(self, unit: Unit, view: CorpusView | None = None) -> None:
        """Render a unit and write its part.

        Args:
            view: the snapshot, which has the unsealed answers.
        """
        if unit.entry is None:
            assert view is not None, "only the process that holds the snapshot reads unsealed answers"
            samples = view.unsealed
        else:
            samples = self._corpus.part(unit.entry, unit.groups, self.columns, unit.asks_sha256)
        part.write(self._parts / unit.name, self._renderer.render(samples))

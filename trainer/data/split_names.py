"""Notice rows that are held out by a split whose name may be misspelt, such as "Train". Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from harvester.quality.held_out import named_split
from harvester.store.shards.schema import Sample
from harvester.system.counted import counted, first_few

# How names of splits begin that are held out on purpose, in any capitals: "Test", "validation_matched".
_HELD_OUT = ("test", "eval", "val", "dev", "held", "hold")
# Different names that are counted, those shown, and how many of their characters. Further ones are counted
# together.
_COUNTED, _SHOWN, _SHOWN_CHARACTERS = 100, 3, 40
_OTHERS = ""


class UnknownSplits:
    """Counts the rows with a split that is neither "train" nor one that is usually held out.

    Args:
        field: metadata field with a row's split.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._counts: Counter[str] = Counter()

    def add(self, sample: Sample) -> None:
        """Count a row. Those that were harvested for evaluation are held out whatever their split."""
        split = named_split(sample.metadata, self._field)
        if split in {"", "train"} or sample.purpose == "eval" or split.casefold().startswith(_HELD_OUT):
            return
        self._count(split, 1)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each name."""
        return dict(self._counts)

    def add_counts(self, counts: Mapping[str, int]) -> None:
        """Count the rows of another `UnknownSplits`, by its `counts`."""
        for split, rows in counts.items():
            self._count(split, rows)

    def notes(self) -> tuple[str, ...]:
        """Return a line that names the splits; nothing if there are none."""
        if not self._counts:
            return ()
        rows = self._counts.total()
        names = [
            f"{_excerpt(split)!r} ({counted(of_split, 'row')})"
            for split, of_split in self._counts.most_common()
            if split != _OTHERS
        ]
        return (
            f"{counted(rows, 'row')} {'is' if rows == 1 else 'are'} held out by a split of an unusual name: "
            f"{first_few(names, _SHOWN, ', ')}; only {self._field} = 'train' is learned",
        )

    def _count(self, split: str, rows: int) -> None:
        self._counts[split if split in self._counts or len(self._counts) < _COUNTED else _OTHERS] += rows


def _excerpt(split: str) -> str:
    return split if len(split) <= _SHOWN_CHARACTERS else f"{split[:_SHOWN_CHARACTERS]}..."

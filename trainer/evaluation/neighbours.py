"""Find the rows of a corpus whose prompts are most like a given prompt, by character n-grams. Loads no torch.

Texts are compared as UTF-8 bytes in windows of five, so that languages without spaces work too. Windows are
hashed to 2^18 places and weighed by TF-IDF (Salton and Buckley 1988); the similarity is the cosine, 0 to 1.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 5
PLACES = 1 << 18
# Bytes of a text that are compared.
LONGEST = 4000
# Rows that are searched at most, evenly spread: 50,000 prompts of 200 bytes take 80 MB.
MOST_ROWS = 50_000

_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 1 << 64) for k in range(1, WINDOW + 1)], dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row near a prompt: its place in the list of texts that were searched, and the similarity."""

    place: int
    similarity: float


# The hashed places of a text's windows, each once, and 1 + log of how often it occurs.
Windows = tuple[NDArray[np.int32], NDArray[np.float32]]
NOTHING: Windows = (np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32))


def windows(text: str) -> Windows:
    """Return what is compared of a text."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    data = np.frombuffer(folded.encode("utf-8", "replace")[:LONGEST], dtype=np.uint8)
    data = np.pad(data, (0, max(0, WINDOW - len(data)))).astype(np.uint64)
    with np.errstate(over="ignore"):
        hashed = (np.lib.stride_tricks.sliding_window_view(data, WINDOW) * _POWERS).sum(axis=1)
        mixed = (hashed ^ (hashed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    places, counts = np.unique((mixed >> np.uint64(46)).astype(np.int32), return_counts=True)
    return places, (1 + np.log(counts)).astype(np.float32)


class TextIndex:
    """TF-IDF vectors of some texts.

    Args:
        rows: `windows` of at least one text.
    """

    def __init__(self, rows: Sequence[Windows]) -> None:
        self._starts = np.cumsum([0, *(len(places) for places, _ in rows)])
        self._places = np.concatenate([places for places, _ in rows])
        known = np.bincount(self._places, minlength=PLACES)
        self._idf = (np.log((1 + len(rows)) / (1 + known)) + 1).astype(np.float32)
        weights = np.concatenate([weights for _, weights in rows]) * self._idf[self._places]
        norms = np.sqrt(np.add.reduceat(weights**2, self._starts[:-1]))
        self._weights = weights / np.repeat(norms, np.diff(self._starts))

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextIndex:
        """Index texts, of which there is at least one."""
        return cls([windows(text) for text in texts])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def similarities(self, text: str) -> NDArray[np.float32]:
        """Return the cosine between a text and each indexed one."""
        places, counts = windows(text)
        query = np.zeros(PLACES, dtype=np.float32)
        query[places] = counts * self._idf[places]
        query /= np.sqrt((query**2).sum())
        shares = np.add.reduceat(query[self._places] * self._weights, self._starts[:-1])
        return np.asarray(np.minimum(shares, 1.0), dtype=np.float32)

    def nearest(self, text: str, count: int, *, but: int | None = None) -> list[Neighbour]:
        """Return the most similar texts, the nearest first.

        Args:
            but: place of a text that is left out: the one that is looked for.
        """
        similarities = self.similarities(text)
        if but is not None:
            similarities[but] = -1
        order = np.argsort(-similarities, kind="stable")[:count]
        return [Neighbour(int(n), float(similarities[n])) for n in order if similarities[n] >= 0]

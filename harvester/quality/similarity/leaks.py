"""Find texts that contain, equal or nearly equal a text of an evaluation set.

Three checks, the strictest first. Exact: a text equals one of the set, once Unicode form, case and white
space are folded. Overlap: they have at least a share of the shorter one's runs of 13 words in common (Brown
et al. 2020, appendix C); a text of 8 to 12 words is one run; a shorter one is compared by the other checks.
Fuzzy: near duplicates, as in `duplicates`; texts whose numbers differ are none.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from harvester.quality.similarity.duplicates import DEFAULT_THRESHOLD, Duplicates
from harvester.quality.similarity.hash_table import HashTable
from harvester.quality.similarity.texts import normalised, words_of

# Words of a run.
RUN_WORDS = 13
# The shortest text that is looked for inside others, in words.
LEAST_RUN_WORDS = 8
DEFAULT_OVERLAP = 0.5
# Characters of a text that its label keeps, for reports.
LABEL_CHARACTERS = 400


class LeakKind(StrEnum):
    """How a text repeats one of an evaluation set."""

    EXACT = "exact"
    OVERLAP = "overlap"
    FUZZY = "fuzzy"


@dataclass(frozen=True, slots=True)
class Leak:
    """A hit: how, the label of the text that was hit, and the share of runs or the similarity (0 to 1)."""

    kind: LeakKind
    label: str
    score: float


class LeakIndex:
    """The texts that must not be in training data.

    Args:
        overlap: least share of the shorter text's runs; 0: any common run.
        similarity: least similarity of a fuzzy hit.
        folder: where the files lie; None for the folder of temporary files (TMPDIR).
    """

    def __init__(
        self,
        overlap: float = DEFAULT_OVERLAP,
        similarity: float = DEFAULT_THRESHOLD,
        folder: Path | None = None,
    ) -> None:
        self._overlap = overlap
        self._stack = ExitStack()
        self._texts = self._stack.enter_context(closing(Duplicates("near", similarity, folder)))
        self._runs = self._stack.enter_context(closing(HashTable(folder)))
        self._labels: list[str] = []
        self._sizes = array("I")
        self._short: set[int] = set()

    def __len__(self) -> int:
        return len(self._labels)

    def add(self, text: str, label: str) -> None:
        """Add a text of an evaluation set."""
        self._texts.find(text, label)
        words = words_of(normalised(text))
        number, length = len(self._labels), min(RUN_WORDS, len(words))
        runs = _runs(words, length) if length >= LEAST_RUN_WORDS else set()
        self._labels.append(label)
        self._sizes.append(len(runs))
        if runs and length < RUN_WORDS:
            self._short.add(length)
        for run in runs:
            self._runs.add(run, number)

    def find(self, texts: Iterable[str]) -> Leak | None:
        """Return the first hit of any of these texts; None if there is none."""
        for text in texts:
            if (leak := self._find(text)) is not None:
                return leak
        return None

    def _find(self, text: str) -> Leak | None:
        if not self._labels or not text.strip():
            return None
        match = self._texts.match(text)
        if match is not None and match.similarity == 1.0:
            return Leak(LeakKind.EXACT, match.label, 1.0)
        if (overlap := self._overlapping(words_of(normalised(text)))) is not None:
            return overlap
        return None if match is None else Leak(LeakKind.FUZZY, match.label, match.similarity)

    def _overlapping(self, words: Sequence[str]) -> Leak | None:
        hits: Counter[int] = Counter()
        own = 0
        for length in (RUN_WORDS, *sorted(self._short)):
            if len(words) < length:
                continue
            runs = _runs(words, length)
            own = own or len(runs)
            for run in runs:
                hits.update(self._runs.get(run))
        if not hits:
            return None
        shares = {number: min(1.0, count / min(self._sizes[number], own)) for number, count in hits.items()}
        number = max(sorted(shares), key=lambda at: shares[at])
        if shares[number] < self._overlap:
            return None
        return Leak(LeakKind.OVERLAP, self._labels[number], shares[number])

    def close(self) -> None:
        """Give memory and files back."""
        self._stack.close()


def leak_label(source: str, place: str, text: str) -> str:
    """Return the label of a text: the set that it belongs to, its place in it, and its beginning."""
    return "\x1f".join((source, place, text[:LABEL_CHARACTERS]))


def parse_label(label: str) -> tuple[str, str]:
    """Return set and place as one text, and the beginning of the text, from a label."""
    source, place, text = label.split("\x1f", 2)
    return f"{source} {place}", text


def user_texts(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what the user says in a conversation: texts that an evaluation set may hold."""
    texts = []
    for message in messages:
        content = message.get("content")
        if message.get("role") != "user":
            continue
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [part["text"] for part in content if isinstance(part, dict) and "text" in part]
    return texts


def _runs(words: Sequence[str], length: int) -> set[int]:
    """Return the hash of every run of `length` words."""
    return {hash((length, *words[at : at + length])) for at in range(len(words) - length + 1)}

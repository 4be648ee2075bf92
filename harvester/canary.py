"""Has the teacher changed? Its answers to the same few prompts, now and then, told apart by law. Pure.

A model or a build that names itself otherwise is a change, whatever it answers. Answers of one build differ
too (sampling, batching at the teacher's), so words count as a change only beyond a tolerance, in the mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Reply:
    """What a canary brought: its text (or refusal), and who the teacher said it was."""

    text: str
    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One round against the reference. `changes` is empty where the teacher is who it was."""

    distance: float | None
    changes: list[str]
    models: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    furthest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "distance": None if self.distance is None else round(self.distance, 4),
            "changes": self.changes,
            "models": dict(self.models),
            "fingerprints": dict(self.fingerprints),
            "furthest": self.furthest,
        }


def distance(before: str, after: str) -> float:
    """How much of two texts differs: 0.0 for equal words in equal order, 1.0 without a common word.

    One minus Sorensen and Dice's coefficient over words and pairs of neighbouring words, as multisets.
    """
    parts = [_parts(text) for text in (before, after)]
    count = parts[0].total() + parts[1].total()
    return 1.0 - 2 * (parts[0] & parts[1]).total() / count if count else 0.0


def _parts(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter([*((word,) for word in words), *pairwise(words)])


def compare(reference: Mapping[str, Reply], replies: Mapping[str, Reply], tolerance: float) -> Finding:
    """A round's replies, by what was asked, against the reference; a new question differs from nothing."""
    common = [ask for ask in replies if ask in reference]
    changes = []
    for name in ("model", "fingerprint"):
        before, after = (_names(name, side, common) for side in (reference, replies))
        if new := sorted(set(after) - set(before)):
            changes.append(f"{name} {_said(before)} -> {', '.join(map(repr, new))}")
    far = {ask: distance(reference[ask].text, replies[ask].text) for ask in common}
    mean = sum(far.values()) / len(far) if far else None
    if mean is not None and mean > tolerance:
        changes.append(f"answers differ by {mean:.0%}, tolerance {tolerance:.0%}")
    everyone = list(replies)
    return Finding(
        mean, changes, _names("model", replies, everyone), _names("fingerprint", replies, everyone),
        max(far, key=lambda ask: far[ask], default=""),
    )  # fmt: skip


def _names(name: str, replies: Mapping[str, Reply], asks: list[str]) -> Counter[str]:
    return Counter(getattr(replies[ask], name) for ask in asks)


def _said(names: Mapping[str, int]) -> str:
    return ", ".join(map(repr, sorted(names)))

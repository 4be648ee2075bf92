"""Has the teacher changed? Its answers to the same few prompts, now and then, told apart by law. Pure.

A model or a build that names itself otherwise is a change, whatever it answers. Answers of one build differ
too (sampling, batching at the teacher's), so words count as a change only beyond a tolerance, in the mean.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

"""Of the canaries' own store, inside the store."""
MOST_BUILDS = 20
"""So many builds of one teacher are told apart; another one makes room, and its like is news again."""


@dataclass(frozen=True, slots=True)
class CanaryReply:
    """What a canary brought: its text (or refusal), and who the teacher said it was."""

    text: str
    model: str
    fingerprint: str

    @property
    def voice(self) -> tuple[str, str]:
        """The build, as the teacher names it."""
        return self.model, self.fingerprint


Known = Mapping[str, Sequence[CanaryReply]]
"""By what was asked: a reply of each build that is known, newest last."""


@dataclass(frozen=True, slots=True)
class CanaryChange:
    """One round against what is known. `changes` is empty where the teacher is who it was."""

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


def compare(known: Known, replies: Mapping[str, CanaryReply], tolerance: float) -> CanaryChange:
    """A round's replies, by what was asked, against what is known; a new question differs from nothing.

    A build is compared with itself: a teacher that answers by turns from several is told once for each.
    """
    common = [ask for ask in replies if known.get(ask)]
    changes = []
    for name in ("model", "fingerprint"):
        before = {getattr(one, name) for ones in known.values() for one in ones}
        if new := sorted({getattr(replies[ask], name) for ask in common} - before):
            told = (", ".join(map(repr, names)) for names in (sorted(before), new))
            changes.append(f"{name} {' -> '.join(told)}")
    far = {ask: distance(_kin(known[ask], replies[ask]).text, replies[ask].text) for ask in common}
    mean = sum(far.values()) / len(far) if far else None
    if mean is not None and mean > tolerance:
        changes.append(f"answers differ by {mean:.0%}, tolerance {tolerance:.0%}")
    return CanaryChange(
        mean,
        changes,
        Counter(one.model for one in replies.values()),
        Counter(one.fingerprint for one in replies.values()),
        max(far, key=lambda ask: far[ask], default=""),
    )


def _kin(known: Sequence[CanaryReply], reply: CanaryReply) -> CanaryReply:
    """The newest known reply of the same build, else the newest of all."""
    return next((one for one in reversed(known) if one.voice == reply.voice), known[-1])


def learn(
    known: Known, replies: Mapping[str, CanaryReply], *, changed: bool
) -> dict[str, tuple[CanaryReply, ...]]:
    """What is known after a round: each build's first reply, or that of the last change it had part in."""
    learned = {ask: tuple(ones) for ask, ones in known.items()}
    for ask, reply in replies.items():
        before = learned.get(ask, ())
        others = tuple(one for one in before if one.voice != reply.voice)
        if changed or len(others) == len(before):
            learned[ask] = (*others, reply)[-MOST_BUILDS:]
    return learned


def recollect(
    answers: Iterable[tuple[int, str, CanaryReply]], changed: Collection[int]
) -> dict[str, tuple[CanaryReply, ...]]:
    """What `learn` would know, from all answers of earlier rounds in any order.

    Args:
        answers: round, what was asked, and the reply.
        changed: the rounds that found a change.
    """
    kept: dict[str, dict[tuple[str, str], tuple[int, CanaryReply]]] = {}
    for number, ask, reply in answers:
        builds = kept.setdefault(ask, {})
        held = builds.get(reply.voice)
        rank = (number in changed, number if number in changed else -number)
        if held is None or rank > (held[0] in changed, held[0] if held[0] in changed else -held[0]):
            builds[reply.voice] = (number, reply)
    return {
        ask: tuple(reply for _, reply in sorted(builds.values(), key=lambda one: one[0]))[-MOST_BUILDS:]
        for ask, builds in kept.items()
    }

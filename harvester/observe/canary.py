"""Detect a change of the teacher: compare its answers to the same few prompts, round after round.

A new model name or build is a change, whatever the answers say. The answers of one build differ too, because
of sampling and of batching at the teacher. So a difference in words is a change only if its mean over the
prompts exceeds the tolerance. Rounds are kept in a store of their own, `canary/` inside the store: the
answers as rows, the result of each round as a line of rounds.jsonl.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from harvester.store import paths
from harvester.system import own_files

# At most this many builds are remembered; the oldest is forgotten, and reported as new if it returns.
MOST_BUILDS = 20
_COLUMNS = ("completion", "refusal", "response_model", "system_fingerprint", "metadata_json")


@dataclass(frozen=True, slots=True)
class CanaryReply:
    """The answer to a canary prompt: its text or refusal, and the model and build it names."""

    text: str
    model: str
    fingerprint: str

    @property
    def build(self) -> tuple[str, str]:
        """Model and fingerprint, as the teacher names them."""
        return self.model, self.fingerprint


# Request key -> a reply of each known build, newest last.
KnownReplies = Mapping[str, Sequence[CanaryReply]]


@dataclass(frozen=True, slots=True)
class CanaryChange:
    """The result of comparing one round with the known replies; no `changes` if the teacher is the same.

    Attributes:
        distance: mean over the prompts, from 0 (same words) to 1; None if nothing could be compared.
        changes: what differs, in words.
        models, fingerprints: counts of the round's answers.
        furthest: the request key of the prompt whose answer differs most.
    """

    distance: float | None
    changes: list[str]
    models: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    furthest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "distance": None if self.distance is None else round(self.distance, 4),
            "changes": self.changes,
            "models": dict(self.models),
            "fingerprints": dict(self.fingerprints),
            "furthest": self.furthest,
        }


def distance(before: str, after: str) -> float:
    """Return the distance of two texts: 0.0 for equal words in equal order, 1.0 without a common word.

    One minus Sorensen and Dice's coefficient over words and pairs of neighbouring words, as multisets.
    """
    first, second = _words_and_pairs(before), _words_and_pairs(after)
    count = first.total() + second.total()
    return 1.0 - 2 * (first & second).total() / count if count else 0.0


def _words_and_pairs(text: str) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter([*((word,) for word in words), *pairwise(words)])


def compare(known: KnownReplies, replies: Mapping[str, CanaryReply], tolerance: float) -> CanaryChange:
    """Compare a round's replies (by request key) with the known ones; a new prompt is compared with nothing.

    A build is compared with itself, so a teacher that alternates between builds is reported once for each.

    Args:
        tolerance: mean distance above which different words are a change.
    """
    common = [key for key in replies if known.get(key)]
    changes = []
    for name in ("model", "fingerprint"):
        before = {getattr(reply, name) for known_replies in known.values() for reply in known_replies}
        if new := sorted({getattr(replies[key], name) for key in common} - before):
            lists = (", ".join(map(repr, names)) for names in (sorted(before), new))
            changes.append(f"{name} {' -> '.join(lists)}")
    distances = {
        key: distance(_reply_to_compare(known[key], replies[key]).text, replies[key].text) for key in common
    }
    mean = sum(distances.values()) / len(distances) if distances else None
    if mean is not None and mean > tolerance:
        changes.append(f"answers differ by {mean:.0%}, tolerance {tolerance:.0%}")
    return CanaryChange(
        mean,
        changes,
        Counter(reply.model for reply in replies.values()),
        Counter(reply.fingerprint for reply in replies.values()),
        max(distances, key=lambda key: distances[key], default=""),
    )


def _reply_to_compare(known: Sequence[CanaryReply], reply: CanaryReply) -> CanaryReply:
    """The newest known reply of the same build, else the newest of all."""
    return next((other for other in reversed(known) if other.build == reply.build), known[-1])


def learn(
    known: KnownReplies, replies: Mapping[str, CanaryReply], *, changed: bool
) -> dict[str, tuple[CanaryReply, ...]]:
    """Return the known replies after a round: each build's first one, or that of a round with changes."""
    learned = {key: tuple(known_replies) for key, known_replies in known.items()}
    for key, reply in replies.items():
        before = learned.get(key, ())
        others = tuple(other for other in before if other.build != reply.build)
        if changed or len(others) == len(before):
            learned[key] = (*others, reply)[-MOST_BUILDS:]
    return learned


def _rank(number: int, changed: Collection[int]) -> tuple[bool, int]:
    """Order of preference of a round: the last one with changes, else the first one."""
    return (True, number) if number in changed else (False, -number)


def known_after(
    answers: Iterable[tuple[int, str, CanaryReply]], changed: Collection[int]
) -> dict[str, tuple[CanaryReply, ...]]:
    """Return the known replies that `learn` would give, from all answers of earlier rounds in any order.

    Args:
        answers: round, request key, and the reply.
        changed: the rounds that found a change.
    """
    kept: dict[str, dict[tuple[str, str], tuple[int, CanaryReply]]] = {}
    for number, key, reply in answers:
        builds = kept.setdefault(key, {})
        previous = builds.get(reply.build)
        rank = _rank(number, changed)
        if previous is None or rank > _rank(previous[0], changed):
            builds[reply.build] = (number, reply)
    return {
        key: tuple(reply for _, reply in sorted(builds.values(), key=lambda entry: entry[0]))[-MOST_BUILDS:]
        for key, builds in kept.items()
    }


# Most bytes of rounds.jsonl that are read; a round has some hundred.
MAX_ROUNDS_BYTES = 64 << 20


def read_rounds(store: Path) -> list[dict[str, Any]]:
    """Return the lines of rounds.jsonl, oldest first; a torn last line is left out."""
    rounds = []
    path = store / paths.CANARY / paths.CANARY_ROUNDS
    with contextlib.suppress(OSError):
        for line in own_files.read_text(path, MAX_ROUNDS_BYTES).splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and "round" in entry:
                    rounds.append(entry)
    return rounds


def append_round(store: Path, entry: Mapping[str, Any]) -> None:
    """Append a line to rounds.jsonl. An error of the disk loses the line, not the run."""
    with contextlib.suppress(OSError):
        own_files.append(store / paths.CANARY / paths.CANARY_ROUNDS, json.dumps(entry).encode() + b"\n")


def canary_status(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the part of `canary` in status.json that earlier rounds determine."""
    if not rounds:
        return {}
    changed, last = [entry for entry in rounds if entry.get("changes")], rounds[-1]
    return {
        "rounds": last["round"],
        "asked_at": last.get("at"),
        "distance": last.get("distance"),
        "changes": len(changed),
        "said": "; ".join(changed[-1]["changes"]) if changed else "",
    }


def load_known(store: Path) -> tuple[KnownReplies, int]:
    """Return the known replies, from the rounds in rounds.jsonl, and the number of the last round.

    Raises:
        StoreError, StoreCorrupt: the canaries' store can't be read.
    """
    from harvester.store.reader import Corpus

    rounds = {entry["round"]: entry for entry in read_rounds(store)}
    last = max(rounds, default=0)

    def answers() -> Iterator[tuple[int, str, CanaryReply]]:
        nonlocal last
        for sample in Corpus.open(store / paths.CANARY).samples(columns=_COLUMNS):
            number, key = sample.metadata.get("round", 0), sample.metadata.get("asks", "")
            if not key:  # a check of an address
                continue
            last = max(last, number)
            if number in rounds or not rounds:  # other rounds were interrupted before they were compared
                text = sample.completion or sample.refusal or ""
                yield number, key, CanaryReply(text, sample.response_model, sample.system_fingerprint)

    changed = {number for number, entry in rounds.items() if entry.get("changes")}
    return known_after(answers(), changed), last

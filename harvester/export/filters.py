"""Filters are pure functions in a row: Sample -> Keep or Drop with its reason.

A filter that must remember (duplicates) is a callable value built fresh for each curation; none of them
reads a clock, a file or a random number.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harvester.errors import ConfigError
from harvester.store.shards.schema import Sample


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a sample was left out; `reason` is a short stable name that is tallied."""

    reason: str


Filter = Callable[[Sample], Drop | None]
"""Returns None to keep."""


def chain(filters: Sequence[Filter]) -> Filter:
    """The first filter that drops decides."""

    def chained(sample: Sample) -> Drop | None:
        return next((drop for each in filters if (drop := each(sample)) is not None), None)

    return chained


def finished(sample: Sample) -> Drop | None:
    """Only whole answers: not truncated, filtered, refused, empty, nor a bare tool call."""
    return None if sample.outcome == "ok" else Drop(f"outcome_{sample.outcome}")


def not_blank(sample: Sample) -> Drop | None:
    """The completion holds something other than white space."""
    return None if (sample.completion or "").strip() else Drop("blank")


def agrees_with_reference(sample: Sample) -> Drop | None:
    """Verifier filter (rejection sampling): where a reference exists the answer must equal it."""
    if sample.reference is None or (sample.completion or "").strip() == sample.reference.strip():
        return None
    return Drop("differs_from_reference")


def longest(characters: int) -> Filter:
    """Drops completions longer than `characters`."""

    def check(sample: Sample) -> Drop | None:
        return Drop("too_long") if len(sample.completion or "") > characters else None

    return check


def no_duplicates() -> Filter:
    """Drops a (conversation, completion) seen before, compared by NFKC, case and white space folded."""
    seen: set[bytes] = set()

    def check(sample: Sample) -> Drop | None:
        parts = [str(message.get("content")) for message in sample.messages] + [sample.completion or ""]
        text = "\x1f".join(" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in parts)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen:
            return Drop("duplicate")
        seen.add(digest)
        return None

    return check


def named(name: str, value: object = None) -> Filter:
    """The filter a curate.toml means by `name`.

    Raises:
        ConfigError: unknown name, or `longest` without a positive number.
    """
    if name == "longest":
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError("filter 'longest' needs a positive number of characters")
        return longest(value)
    if name == "no_duplicates":
        return no_duplicates()
    plain: dict[str, Filter] = {
        "finished": finished,
        "not_blank": not_blank,
        "agrees_with_reference": agrees_with_reference,
    }
    if name not in plain:
        raise ConfigError(f"unknown filter {name!r}", remedy=f"known: {', '.join(FILTER_NAMES)}")
    return plain[name]


FILTER_NAMES = ("finished", "not_blank", "agrees_with_reference", "longest", "no_duplicates")

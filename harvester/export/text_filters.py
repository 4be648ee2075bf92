"""Filters that look at the text of an answer: length, repetition, language, refusals, reasoning."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from harvester.errors import ConfigError
from harvester.export.drops import Drop, Filter
from harvester.export.refusal_phrases import REFUSALS
from harvester.quality.similarity.texts import normalised, words_of
from harvester.store.shards.schema import Sample

# Words of a run that may not come again and again, and the share of an answer in repeated runs from which
# on it is repetitive.
RUN_WORDS = 8
DEFAULT_REPETITION = 0.3

# Characters at the beginning of an answer in which a refusal is looked for.
REFUSAL_CHARACTERS = 200

# Characters below which a language can't be told.
LEAST_FOR_LANGUAGE = 40


def tokens(least: int = 0, most: int | None = None) -> Filter:
    """Build a filter that drops answers with fewer or more tokens, by the teacher's own count."""

    def check(sample: Sample) -> Drop | None:
        if sample.output_tokens < least:
            return Drop("too_few_tokens", f"{sample.output_tokens:,} tokens")
        if most is not None and sample.output_tokens > most:
            return Drop("too_many_tokens", f"{sample.output_tokens:,} tokens")
        return None

    return check


def repetition(most: float = DEFAULT_REPETITION) -> Filter:
    """Build a filter that drops answers of which a larger share repeats itself (loops, copied passages).

    The share is that of the words in runs of 8 words that occurred before in the answer.
    """

    def check(sample: Sample) -> Drop | None:
        share = repeated_share(sample.completion or "")
        return Drop("repetitive", f"{share:.0%} repeats itself") if share > most else None

    return check


def repeated_share(text: str) -> float:
    """Return the share of words in runs of 8 words that came before; 0.0 for texts that are too short."""
    words = words_of(normalised(text))
    seen: set[tuple[str, ...]] = set()
    repeated = bytearray(len(words))
    for at in range(len(words) - RUN_WORDS + 1):
        run = tuple(words[at : at + RUN_WORDS])
        if run in seen:
            repeated[at : at + RUN_WORDS] = b"\x01" * RUN_WORDS
        seen.add(run)
    return sum(repeated) / len(words) if words else 0.0


def language(wanted: Collection[str]) -> Filter:
    """Build a filter that drops answers in other languages than these (ISO 639-1 codes, in any case).

    Answers of fewer than 40 characters are kept: their language can't be told.

    Raises:
        ConfigError: the extra `curate` is not installed, or it knows no such language.
    """
    identify = _identifier()
    kept = frozenset(code.strip().lower() for code in wanted)
    if unknown := sorted(kept - _known_languages()):
        raise ConfigError(
            f"filter 'language': no code of a language that is known: {', '.join(map(repr, unknown))}",
            remedy=f"known: {', '.join(sorted(_known_languages()))}",
        )

    def check(sample: Sample) -> Drop | None:
        text = sample.completion or ""
        if len(text.strip()) < LEAST_FOR_LANGUAGE:
            return None
        code = identify(text)
        return None if code in kept else Drop("other_language", code)

    return check


@cache
def _identifier() -> Any:
    """Return a function from a text to its language's code; loads a model of 5 MB."""
    try:
        from py3langid import classify
    except ImportError:
        raise ConfigError(
            "filter 'language' needs py3langid", remedy="pip install 'blackbox-distillation[curate]'"
        ) from None
    return lambda text: str(classify(text)[0])


@cache
def _known_languages() -> frozenset[str]:
    from py3langid import rank

    return frozenset(str(code) for code, _ in rank(""))


def no_refusals(sample: Sample) -> Drop | None:
    """Drop answers that begin with a refusal, in one of 15 languages, or that the teacher marked as one."""
    if sample.refusal or sample.outcome == "refused":
        return Drop("refusal", "marked by the teacher")
    start = normalised((sample.completion or "")[: 2 * REFUSAL_CHARACTERS])[:REFUSAL_CHARACTERS]
    start = start.replace("’", "'")
    for code, pattern in _compiled().items():
        if match := pattern.search(start):
            return Drop("refusal", f"{code}: {match[0]}")
    return None


@cache
def _compiled() -> Mapping[str, re.Pattern[str]]:
    return {code: re.compile(normalised(pattern)) for code, pattern in REFUSALS.items()}


def finished_reasoning(sample: Sample) -> Drop | None:
    """Drop answers whose reasoning is cut: an open think tag, or reasoning without an answer."""
    text = sample.completion or ""
    tags = re.findall(r"(?i)<(/?)(?:think|thinking|reasoning)>", text)
    opened, closed = tags.count(""), tags.count("/")
    if opened > closed:
        return Drop("reasoning_cut", "the think tag is not closed")
    answer = re.sub(r"(?is)^.*</(?:think|thinking|reasoning)>", "", text)
    if (sample.reasoning or opened) and not answer.strip():
        return Drop("reasoning_cut", "reasoning without an answer")
    return None

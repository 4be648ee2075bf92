"""Filters by published rules for the quality of web text: Gopher, C4 and FineWeb.

The thresholds are those of the papers; each can be set in curate.toml, and `without` leaves rules out. They
were found for web pages in English. Many good answers of a teacher break them: a short answer has too few
words, code has braces, a list has short lines. Look at the page of a curation before you rely on them.

A word is what stands between white space, punctuation included. The papers leave open how they divide a text;
datatrove uses a tokenizer for each language instead.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harvester.errors import ConfigError
from harvester.export.drops import Drop, Filter
from harvester.quality.similarity.texts import spaced_words
from harvester.store.shards.schema import Sample

Limits = Mapping[str, float]
# What a rule finds: its name, and the figure that breaks the limit, in words.
Finding = tuple[str, str]
Rules = Callable[[str, Limits], Iterator[Finding]]

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_ELLIPSES = ("...", "…")
_BULLETS = ("•", "‣", "▪", "●", "◦", "-", "*", "–")
# Ends of sentences, in scripts of all kinds, and quotes after them.
_ENDS = (".", "?", "!", '"', "'", "”", "’", "»", "。", "？", "！", "」", "』", "؟", "۔", "।", "…")
_C4_ENDS = (".", "?", "!", '"', "'", "”", "’")
_POLICIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
_CITATION = re.compile(r"\[(?:\d*|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s|$)""")
_PUNCTUATION = ".,;:!?…\"'()[]*“”‘’"
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class RuleSet:
    """Rules from one source.

    Attributes:
        limits: thresholds by name, as published.
        rules: yields what a text breaks.
        names: of the rules.
    """

    limits: Limits
    rules: Rules
    names: tuple[str, ...]


def build(name: str, value: object) -> Filter:
    """Build the filter of a rule set from its value in curate.toml.

    Args:
        value: None for the published thresholds, or a table of thresholds and `without`, a list of rules.

    Raises:
        ConfigError: another name or value.
    """
    rule_set = RULE_SETS[name]
    table: Mapping[str, Any] = value if isinstance(value, dict) else {}
    without, given = table.get("without", []), {k: v for k, v in table.items() if k != "without"}
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"filter {name!r} needs a table", remedy=_remedy(name))
    if unknown := sorted(given.keys() - rule_set.limits.keys()):
        raise ConfigError(
            f"filter {name!r} has no threshold {unknown[0]!r}",
            remedy=f"known: {', '.join(rule_set.limits)}, without",
        )
    limits = {**rule_set.limits, **given}
    _check_limits(name, limits)
    if not isinstance(without, list):
        raise ConfigError(f"filter {name!r}: 'without' is a list of rules", remedy=_remedy(name))
    known = without
    if unknown := [str(rule) for rule in known if rule not in rule_set.names]:
        raise ConfigError(
            f"filter {name!r} has no rule {unknown[0]!r}", remedy=f"known: {', '.join(rule_set.names)}"
        )
    return _filter(name, rule_set, limits, frozenset(known))


def _check_limits(name: str, limits: Mapping[str, Any]) -> None:
    """Require numbers from 0 on, and no range that is empty.

    Raises:
        ConfigError: names the threshold.
    """
    for key, number in limits.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number < math.inf:  # not a number is not in there either
            raise ConfigError(f"filter {name!r}: {key!r} is a number from 0 on", remedy=_remedy(name))
    for key, number in limits.items():
        most = key.replace("least_", "most_", 1)
        if most != key and number > limits.get(most, math.inf):
            raise ConfigError(
                f"filter {name!r}: {key!r} is above {most!r}, so nothing would be kept", remedy=_remedy(name)
            )


def _remedy(name: str) -> str:
    rule_set = RULE_SETS[name]
    key, number = next(iter(rule_set.limits.items()))
    return f'{{{name} = {{{key} = {number:g}, without = ["{rule_set.names[0]}"]}}}}'


def _filter(name: str, rule_set: RuleSet, limits: Limits, without: frozenset[str]) -> Filter:
    source = name.partition("_")[0]

    def check(sample: Sample) -> Drop | None:
        for rule, figure in rule_set.rules(sample.completion or "", limits):
            if rule not in without:
                return Drop(f"{source}_{rule}", figure)
        return None

    return check


def gopher_quality(text: str, limits: Limits) -> Iterator[Finding]:
    """Yield the rules of Gopher for the quality of a document that a text breaks.

    Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1: 50 to 100,000 words of 3 to 10 characters on average;
    at most one hash or ellipsis for ten words; at most 90 % of the lines begin with a bullet and 30 % end
    with an ellipsis; 80 % of the words have a letter; two of eight common English words occur.
    """
    words = spaced_words(text)
    count = len(words)
    if count < limits["least_words"]:
        yield "too_few_words", f"{count:,} words"
    if count > limits["most_words"]:
        yield "too_many_words", f"{count:,} words"
    if not count:
        return
    length = sum(map(len, words)) / count
    if length < limits["least_word_length"]:
        yield "short_words", f"{length:.1f} characters a word"
    if length > limits["most_word_length"]:
        yield "long_words", f"{length:.1f} characters a word"
    for rule, symbols in (("hashes", ("#",)), ("ellipses", _ELLIPSES)):
        ratio = sum(text.count(symbol) for symbol in symbols) / count
        if ratio > limits["most_symbols"]:
            yield rule, f"{ratio:.2f} a word"
    yield from _gopher_lines(_lines(text), limits)
    with_letter = _share(any(map(str.isalpha, word)) for word in words)
    if with_letter < limits["least_alphabetic"]:
        yield "no_letters", f"{with_letter:.0%} of the words have a letter"
    stop_words = STOP_WORDS & {word.casefold().strip(_PUNCTUATION) for word in words}
    if len(stop_words) < limits["least_stop_words"]:
        yield "no_stop_words", f"{len(stop_words)} of {len(STOP_WORDS)} common words"


def _gopher_lines(lines: Sequence[str], limits: Limits) -> Iterator[Finding]:
    bullets = _share(line.startswith(_BULLETS) for line in lines)
    if bullets > limits["most_bullets"]:
        yield "bullet_lines", f"{bullets:.0%} of the lines"
    cut = _share(line.endswith(_ELLIPSES) for line in lines)
    if cut > limits["most_ellipsis_lines"]:
        yield "ellipsis_lines", f"{cut:.0%} of the lines"


def gopher_repetition(text: str, limits: Limits) -> Iterator[Finding]:
    """Yield the rules of Gopher against repetition that a text breaks.

    Rae et al. 2021 (arXiv 2112.11446), table A1: shares of repeated lines and paragraphs, by number (30 %)
    and characters (20 %); of the characters in the commonest run of 2, 3 and 4 words (20, 18, 16 %); and of
    those in runs of 5 to 10 words that came before (15 to 10 %). A run that occurs once repeats nothing, so
    it does not count as the commonest one, however short the text is.
    """
    if not text.strip():
        return
    parts = {"lines": _lines(text), "paragraphs": [p for p in _PARAGRAPH_BREAK.split(text) if p.strip()]}
    for name, pieces in parts.items():
        repeated = _repeated(pieces)
        share, of_text = len(repeated) / len(pieces), sum(map(len, repeated)) / len(text)
        if share > limits[f"most_repeated_{name}"]:
            yield f"repeated_{name}", f"{share:.0%} of the {name}"
        if of_text > limits["most_repeated_characters"]:
            yield f"characters_in_repeated_{name}", f"{of_text:.0%} of the text"
    words = spaced_words(text)
    for length in (2, 3, 4):
        counts = Counter(_runs(words, length))
        run, times = max(counts.items(), key=lambda pair: (pair[1], len(pair[0])), default=("", 0))
        share = len(run) * times / len(text)
        if times > 1 and share > limits[f"most_top_{length}"]:
            yield f"top_{length}_words", f"{share:.0%} of the text is {run[:60]!r}"
    for length in range(5, 11):
        share = _characters_in_repeated_runs(words, length) / len(text)
        if share > limits[f"most_repeated_{length}"]:
            yield f"repeated_{length}_words", f"{share:.0%} of the text"


def c4_quality(text: str, limits: Limits) -> Iterator[Finding]:
    """Yield the rules of C4 that a text breaks.

    Raffel et al. 2020 (JMLR 21, section 2.2): no "lorem ipsum", no curly bracket, and five sentences. Lines
    count only if they end with a terminal punctuation mark and have three words, none of more than 1,000
    characters, and mention neither JavaScript nor a policy on cookies or privacy. C4 cuts other lines out of
    a page; an answer stays as it is. A sentence ends with . ! or ? before white space. The list of bad words
    is left out.
    """
    lowered = text.lower()
    if "lorem ipsum" in lowered:
        yield "lorem_ipsum", ""
    if "{" in text:
        yield "curly_bracket", ""
    sentences = 0
    for raw in text.splitlines():
        line = _CITATION.sub("", raw).strip()
        words = spaced_words(line)
        folded = line.lower()
        is_kept = (
            line.endswith(_C4_ENDS)
            and not line.endswith("...")
            and len(words) >= limits["least_line_words"]
            and max(map(len, words)) <= limits["most_word_length"]
            and "javascript" not in folded
            and not any(policy in folded for policy in _POLICIES)
        )
        sentences += max(1, len(_SENTENCE_END.findall(line))) if is_kept else 0
    if sentences < limits["least_sentences"]:
        yield "too_few_sentences", f"{sentences} in lines that C4 keeps"


def fineweb_quality(text: str, limits: Limits) -> Iterator[Finding]:
    """Yield the rules of FineWeb that a text breaks.

    Penedo et al. 2024 (arXiv 2406.17557), section 3.5: 12 % of the lines or fewer end with punctuation; 10 %
    of the characters or more are in repeated lines (datatrove's default is 1 %); 67 % of the lines or more
    have 30 characters at most. datatrove also drops texts with more than 0.3 line breaks a word. Lines of
    white space don't count.
    """
    lines = _lines(text)
    if not lines:
        yield "no_line", ""
        return
    ended = _share(line.endswith(_ENDS) for line in lines)
    if ended <= limits["least_ended_lines"]:
        yield "unended_lines", f"{ended:.0%} of the lines end with punctuation"
    short = _share(len(line) <= limits["short_line"] for line in lines)
    if short >= limits["most_short_lines"]:
        yield "short_lines", f"{short:.0%} of the lines"
    repeated = sum(map(len, _repeated(lines))) / sum(map(len, lines))
    if repeated >= limits["most_repeated_characters"]:
        yield "characters_in_repeated_lines", f"{repeated:.0%} of the text"
    breaks = text.strip().count("\n") / len(spaced_words(text))
    if breaks > limits["most_breaks"]:
        yield "line_breaks", f"{breaks:.2f} line breaks a word"


def _lines(text: str) -> list[str]:
    """Return the lines that are not blank, without white space around them."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _share(flags: Iterator[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values) if values else 0.0


def _repeated(pieces: Sequence[str]) -> list[str]:
    """Return the pieces that occurred before."""
    seen: set[str] = set()
    repeated = []
    for piece in pieces:
        if piece in seen:
            repeated.append(piece)
        seen.add(piece)
    return repeated


def _runs(words: Sequence[str], length: int) -> list[str]:
    """Return all runs of so many words."""
    return [" ".join(words[at : at + length]) for at in range(len(words) - length + 1)]


def _characters_in_repeated_runs(words: Sequence[str], length: int) -> int:
    """Return the characters of runs that came before; each character counts once."""
    seen: set[tuple[str, ...]] = set()
    characters, at = 0, 0
    while at <= len(words) - length:
        run = tuple(words[at : at + length])
        if run in seen:
            characters += sum(map(len, run)) + length - 1
            at += length
        else:
            seen.add(run)
            at += 1
    return characters


RULE_SETS: Mapping[str, RuleSet] = {
    "gopher_quality": RuleSet(
        {
            **{"least_words": 50, "most_words": 100_000, "least_word_length": 3, "most_word_length": 10},
            **{"most_symbols": 0.1, "most_bullets": 0.9, "most_ellipsis_lines": 0.3},
            **{"least_alphabetic": 0.8, "least_stop_words": 2},
        },
        gopher_quality,
        (
            *("too_few_words", "too_many_words", "short_words", "long_words", "hashes", "ellipses"),
            *("bullet_lines", "ellipsis_lines", "no_letters", "no_stop_words"),
        ),
    ),
    "gopher_repetition": RuleSet(
        {
            **{"most_repeated_lines": 0.3, "most_repeated_paragraphs": 0.3, "most_repeated_characters": 0.2},
            **{"most_top_2": 0.20, "most_top_3": 0.18, "most_top_4": 0.16},
            **{f"most_repeated_{length}": round(0.20 - length / 100, 2) for length in range(5, 11)},
        },
        gopher_repetition,
        (
            *("repeated_lines", "characters_in_repeated_lines"),
            *("repeated_paragraphs", "characters_in_repeated_paragraphs"),
            *(f"top_{length}_words" for length in (2, 3, 4)),
            *(f"repeated_{length}_words" for length in range(5, 11)),
        ),
    ),
    "c4_quality": RuleSet(
        {"least_sentences": 5, "least_line_words": 3, "most_word_length": 1000},
        c4_quality,
        ("lorem_ipsum", "curly_bracket", "too_few_sentences"),
    ),
    "fineweb_quality": RuleSet(
        {
            **{"least_ended_lines": 0.12, "most_short_lines": 0.67, "short_line": 30},
            **{"most_repeated_characters": 0.1, "most_breaks": 0.3},
        },
        fineweb_quality,
        ("no_line", "unended_lines", "short_lines", "characters_in_repeated_lines", "line_breaks"),
    ),
}

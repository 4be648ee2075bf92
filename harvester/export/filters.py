"""Name the filters of `harvester curate`, and build them from the values in curate.toml.

`drops` says what a filter is.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.export import (
    format_filters,
    masking,
    own_filters,
    quality_rules,
    survey_filters,
    text_filters,
)
from harvester.export.drops import Drop, Filter, chain
from harvester.export.score import candidate_of
from harvester.quality.similarity.duplicates import DEFAULT_THRESHOLD, LEAST_THRESHOLD, Duplicates
from harvester.quality.verifiers.settings import ADD_VERIFIER
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from harvester.store.shards.schema import Sample
from harvester.store.where import Where

__all__ = ["FILTER_NAMES", "Drop", "Filter", "FilterContext", "chain", "named"]


def finished(sample: Sample) -> Drop | None:
    """Drop answers that are truncated, filtered, refused, empty or only a tool call."""
    return None if sample.outcome == "ok" else Drop(f"outcome_{sample.outcome}")


def not_blank(sample: Sample) -> Drop | None:
    """Drop completions of white space only."""
    return None if (sample.completion or "").strip() else Drop("blank")


def agrees_with_reference(sample: Sample) -> Drop | None:
    """Drop answers that differ from the prompt's reference, where it has one (rejection sampling)."""
    if sample.reference is None or (sample.completion or "").strip() == sample.reference.strip():
        return None
    return Drop("differs_from_reference")


def verified(verifiers: Verifiers) -> Filter:
    """Build a filter that keeps the answers that pass the verifier of their task.

    Answers that nobody can verify are dropped under a reason of their own.
    """

    def check(sample: Sample) -> Drop | None:
        verdict = verifiers.judge(candidate_of(sample)).verdict
        return None if verdict == AnswerVerdict.PASSED else Drop(f"verify_{verdict}")

    return check


def longest(characters: int) -> Filter:
    """Build a filter that drops completions longer than `characters`."""

    def check(sample: Sample) -> Drop | None:
        return Drop("too_long") if len(sample.completion or "") > characters else None

    return check


def of_runs(run_ids: Collection[str]) -> Filter:
    """Build a filter that drops answers of other runs than these."""
    kept = frozenset(run_ids)

    def check(sample: Sample) -> Drop | None:
        return None if sample.run_id in kept else Drop("other_run")

    return check


def chosen_by(where: Where) -> Filter:
    """Build a filter that drops the rows that a condition does not choose."""

    def check(sample: Sample) -> Drop | None:
        return None if where.matches(sample) else Drop("where")

    return check


def no_duplicates() -> Filter:
    """Build a filter that drops a repeated (conversation, completion), with NFKC, case and space folded."""
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


def near_duplicates(threshold: float, of: str = "row") -> Filter:
    """Build a filter that drops what nearly repeats an earlier row, its prompt or its answer.

    Args:
        threshold: least Jaccard similarity of the sets of character shingles, 0 to 1.
        of: "row" compares conversation and answer, "answer" the answer alone. "prompt" compares
            conversations; further samples of one prompt are kept.
    """
    duplicates = Duplicates("near", threshold)

    def check(sample: Sample) -> Drop | None:
        turns = [str(message.get("content") or "") for message in sample.messages]
        parts = {
            "row": [*turns, sample.completion or ""],
            "prompt": turns,
            "answer": [sample.completion or ""],
        }
        match = duplicates.find("\n".join(parts[of]), sample.prompt_id)
        if match is None or (of == "prompt" and match.similarity == 1.0):
            return None
        return Drop("near_duplicate", f"of the row of {match.label} ({match.similarity:.2f})")

    return check


@dataclass(frozen=True, slots=True)
class FilterContext:
    """What filters are built from besides values: verifiers of `[verify]`, folder of the curate.toml."""

    verifiers: Verifiers | None = None
    folder: Path = Path()

    def require_verifiers(self, name: str) -> Verifiers:
        """Return the verifiers.

        Raises:
            ConfigError: there are none.
        """
        if not self.verifiers:
            raise ConfigError(f"filter {name!r} needs a table [verify]", remedy=ADD_VERIFIER)
        return self.verifiers


def named(name: str, value: object = None, context: FilterContext | Verifiers | None = None) -> Filter:
    """Return the filter of that name in curate.toml.

    Args:
        value: the parameter of a filter that has one.
        context: what filters are built from besides their values; or only the verifiers of `[verify]`.

    Raises:
        ConfigError: the name is unknown, a value is missing or impossible, or `[verify]` is absent.
    """
    if not isinstance(context, FilterContext):
        context = FilterContext(context)
    if name in _PLAIN:
        return _PLAIN[name]
    if name in _BUILDERS:
        return _BUILDERS[name](value, context)
    if (found := own_filters.installed(name)) is not None:
        return found
    raise ConfigError(f"unknown filter {name!r}", remedy=f"known: {', '.join(FILTER_NAMES)}")


def _longest(value: object, _: FilterContext) -> Filter:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError("filter 'longest' needs a positive number of characters", remedy="{longest = 4000}")
    return longest(value)


def _of_runs(value: object, _: FilterContext) -> Filter:
    run_ids = [value] if isinstance(value, str) else value
    if not isinstance(run_ids, list) or not run_ids or not all(isinstance(one, str) for one in run_ids):
        raise ConfigError(
            "filter 'run' needs the id of a run, or a list of them",
            remedy='{run = "ID"}; `harvester report` lists the runs of a store',
        )
    return of_runs(run_ids)


def _tokens(value: object, _: FilterContext) -> Filter:
    table: dict[str, Any] = value if isinstance(value, dict) else {"most": value}
    least, most = table.get("least", 0), table.get("most")
    numbers = [least, *([] if most is None else [most])]
    if table.keys() - {"least", "most"} or not all(type(number) is int and number >= 0 for number in numbers):
        raise ConfigError("filter 'tokens' needs numbers", remedy="{tokens = {least = 5, most = 2000}}")
    if value is None or (most is not None and most < least):
        raise ConfigError("filter 'tokens' needs limits", remedy="{tokens = {least = 5, most = 2000}}")
    return text_filters.tokens(least, most)


def _share(name: str, value: object, default: float | None = None) -> float:
    number = default if value is None else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= 1:
        raise ConfigError(f"filter {name!r} needs a share from 0 to 1", remedy=f"{{{name} = 0.5}}")
    return float(number)


def _language(value: object, _: FilterContext) -> Filter:
    codes = [value] if isinstance(value, str) else value
    if not isinstance(codes, list) or not codes or not all(isinstance(code, str) for code in codes):
        raise ConfigError("filter 'language' needs codes", remedy='{language = ["en", "de"]}')
    return text_filters.language(codes)


def _difficulty(value: object, context: FilterContext) -> Filter:
    table = value if isinstance(value, dict) else {}
    if value is None or table.keys() - {"least", "most"}:
        remedy = "{difficulty = {least = 0.1, most = 0.9}}"
        raise ConfigError("filter 'difficulty' needs limits of the pass rate", remedy=remedy)
    least, most = (_share("difficulty", table.get(key), end) for key, end in (("least", 0), ("most", 1)))
    return survey_filters.Difficulty(least, most, context.require_verifiers("difficulty"))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"filter {name!r} needs a text", remedy=f'{{{name} = "..."}}')
    return value


def _json_schema(value: object, _: FilterContext) -> Filter:
    if not isinstance(value, dict):
        raise ConfigError("filter 'json_schema' needs a table", remedy='{json_schema = {type = "object"}}')
    return format_filters.matches_schema(value)


def _quality_rules(name: str, value: object, _: FilterContext) -> Filter:
    return quality_rules.build(name, value)


def _code(value: object, _: FilterContext) -> Filter:
    if value not in format_filters.CODE_LANGUAGES:
        raise ConfigError(
            f"filter 'code' needs one of {', '.join(format_filters.CODE_LANGUAGES)}",
            remedy='{code = "python"}',
        )
    return format_filters.parses(str(value))


def _forms(name: str, value: object) -> Filter:
    action: masking.Action = "mask" if value == "mask" else "drop"
    if value not in {None, "drop", "mask"}:
        raise ConfigError(f'filter {name!r} needs "drop" or "mask"', remedy=f'{{{name} = "mask"}}')
    return masking.without(masking.PII if name == "pii" else masking.SECRETS, name, action)


def _near_duplicates(value: object, _: FilterContext) -> Filter:
    given = DEFAULT_THRESHOLD if value is None else value
    table: dict[str, Any] = value if isinstance(value, dict) else {"threshold": given}
    threshold, of = table.get("threshold", DEFAULT_THRESHOLD), table.get("of", "row")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if table.keys() - {"threshold", "of"} or of not in {"row", "prompt", "answer"} or not is_number:
        raise ConfigError(
            "filter 'near_duplicates' takes a threshold, and what is compared",
            remedy='{near_duplicates = {threshold = 0.8, of = "row"}}, or of "prompt" or "answer"',
        )
    if not LEAST_THRESHOLD <= threshold <= 1:
        raise ConfigError(
            f"filter 'near_duplicates' needs a threshold from {LEAST_THRESHOLD} to 1",
            remedy="{near_duplicates = 0.8}",
        )
    return near_duplicates(threshold, of)


_PLAIN: Mapping[str, Filter] = {
    "finished": finished,
    "not_blank": not_blank,
    "agrees_with_reference": agrees_with_reference,
    "no_refusals": text_filters.no_refusals,
    "finished_reasoning": text_filters.finished_reasoning,
}
_BUILDERS: Mapping[str, Callable[[object, FilterContext], Filter]] = {
    "verified": lambda _, context: verified(context.require_verifiers("verified")),
    "longest": _longest,
    "tokens": _tokens,
    "repetition": lambda value, _: text_filters.repetition(
        _share("repetition", value, text_filters.DEFAULT_REPETITION)
    ),
    "language": _language,
    "json_schema": _json_schema,
    "pattern": lambda value, _: format_filters.matches_pattern(_text("pattern", value)),
    "no_pattern": lambda value, _: format_filters.matches_pattern(_text("no_pattern", value), wanted=False),
    "code": _code,
    **{name: partial(_quality_rules, name) for name in quality_rules.RULE_SETS},
    "agreement": lambda value, _: survey_filters.Agreement(_share("agreement", value, 0.5)),
    "difficulty": _difficulty,
    "pii": lambda value, _: _forms("pii", value),
    "secrets": lambda value, _: _forms("secrets", value),
    "no_duplicates": lambda value, _: no_duplicates(),
    "near_duplicates": _near_duplicates,
    "run": _of_runs,
    "python": lambda value, context: own_filters.load(_text("python", value), context.folder),
}
FILTER_NAMES = (*_PLAIN, *_BUILDERS)

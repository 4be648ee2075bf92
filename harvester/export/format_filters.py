"""Filters on the format of an answer: JSON Schema, regular expressions, code that parses."""

from __future__ import annotations

import ast
import json
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from harvester.errors import ConfigError
from harvester.export.drops import Drop, Filter
from harvester.store.shards.schema import Sample
from harvester.system import json_schema
from harvester.system.limited_child import ChildError, for_text

# Time limit of one check, and the longest code that is parsed.
TIMEOUT_S = 5.0
MOST_CODE_CHARACTERS = 200_000

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_ALIASES = {"py": "python", "python3": "python"}


def matches_schema(schema: Mapping[str, Any]) -> Filter:
    """Build a filter that drops answers that are not JSON, or JSON that does not match."""
    if problem := json_schema.problem(json_schema.encoded(dict(schema))):
        raise ConfigError(
            f"filter 'json_schema' has no JSON Schema, {problem}", remedy='{json_schema = {type = "object"}}'
        )
    encoded = json_schema.encoded(dict(schema))

    def check(sample: Sample) -> Drop | None:
        try:
            is_valid = json_schema.is_valid_within(sample.completion or "", encoded, TIMEOUT_S)
        except ChildError as error:
            return Drop("no_json" if error.kind == "JSONDecodeError" else "schema_unchecked", str(error))
        except (TimeoutError, MemoryError) as error:
            return Drop("schema_unchecked", type(error).__name__)
        return None if is_valid else Drop("schema_mismatch")

    return check


def matches_pattern(pattern: str, *, wanted: bool = True) -> Filter:
    """Build a filter that drops answers in which a regular expression does not occur, or does.

    Raises:
        ConfigError: it is none.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        name = "pattern" if wanted else "no_pattern"
        raise ConfigError(
            f"filter {name!r} has no regular expression: {error}",
            remedy=f"{{{name} = '^[0-9]+$'}}; in single quotes TOML leaves backslashes as they are",
        ) from None

    def check(sample: Sample) -> Drop | None:
        try:
            call = "harvester.quality.verifiers.limited_checks:has_pattern"
            occurs = bool(for_text.call(call, sample.completion or "", pattern, timeout_s=TIMEOUT_S))
        except (TimeoutError, MemoryError, ChildError) as error:
            return Drop("pattern_unchecked", type(error).__name__)
        if occurs == wanted:
            return None
        return Drop("pattern_missing" if wanted else "pattern_found", pattern)

    return check


def parses(language: str) -> Filter:
    """Build a filter that drops answers whose fenced code blocks in a language don't parse.

    An answer without such a block is kept, unless it has no fence at all and does not parse as a whole.
    """
    parser = _PARSERS[language]

    def check(sample: Sample) -> Drop | None:
        text = sample.completion or ""
        blocks = [(_ALIASES.get(tag.lower(), tag.lower()), code) for tag, code in _BLOCK.findall(text)]
        chosen = [code for tag, code in blocks if tag == language]
        if not blocks:
            chosen = [text]
        for code in chosen:
            if problem := _problem(parser, code):
                return Drop("code_does_not_parse", problem)
        return None

    return check


def _python(code: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape is the answer's matter
        return ast.parse(code)


_PARSERS: Mapping[str, Callable[[str], object]] = {
    "python": _python,
    "json": json.loads,
    "toml": tomllib.loads,
}
CODE_LANGUAGES = tuple(_PARSERS)


def _problem(parser: Callable[[str], object], code: str) -> str:
    if len(code) > MOST_CODE_CHARACTERS:
        return f"longer than {MOST_CODE_CHARACTERS:,} characters"
    try:
        parser(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return ""

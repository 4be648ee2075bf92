"""Check whether an answer has the requested `response_format`: JSON, or JSON that matches a schema. Pure.

An answer of another form was paid for, so it is stored, with the outcome "invalid". A schema is never
fetched over the network: with a `$ref` to another document nothing matches.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from harvester.errors import ConfigError
from harvester.system import json_schema
from harvester.system.limited_child import ChildError

# Limits of one check in a child process; an answer whose check does not end within them does not match.
TIMEOUT_S = 2.0
# Longer texts, and schemas with one of these keywords, are checked in the child: patterns may take
# exponential time, unique items are compared each with each, references may repeat each other.
INLINE_CHARS = 16 * 1024
_COSTLY = (b'"pattern', b'"uniqueItems"', b'"$ref"', b'"$dynamicRef"', b'"$recursiveRef"')


def check(response_format: Mapping[str, Any] | None) -> None:
    """Check that a configured `response_format` has a valid JSON Schema, if any.

    Raises:
        ConfigError: its schema is not valid.
    """
    schema = _schema(response_format or {})
    if schema is None:
        return
    if problem := json_schema.problem(json_schema.encoded(schema)):
        raise ConfigError(
            f"not a valid JSON Schema, {problem}",
            place="sampling.response_format",
            remedy="correct it; a `type` is string, number, integer, boolean, object, array or null",
        )


def matches(text: str, response_format: Any) -> bool:
    """Whether a text has the form that `response_format` asks for; True where it asks for none."""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in {"json_object", "json_schema"}:
        return True
    try:
        value = orjson.loads(text)
    except (orjson.JSONDecodeError, RecursionError):
        return False
    schema = _schema(response_format)
    if schema is None:
        return isinstance(value, dict)
    encoded = json_schema.encoded(schema)
    if len(text) <= INLINE_CHARS and not _is_costly(encoded):
        return json_schema.is_valid(text, encoded)
    try:
        return json_schema.is_valid_within(text, encoded, TIMEOUT_S)
    except (TimeoutError, MemoryError, ChildError):
        return False


def has_costly_schema(response_format: Any) -> bool:
    """Whether the check of an answer may take long, as regular expressions and comparisons of items do."""
    schema = _schema(response_format) if isinstance(response_format, Mapping) else None
    return schema is not None and _is_costly(orjson.dumps(schema))


@lru_cache(maxsize=64)
def _is_costly(schema: bytes) -> bool:
    return any(word in schema for word in _COSTLY)


def _schema(response_format: Mapping[str, Any]) -> Any:
    named = response_format.get("json_schema")
    return named.get("schema") if isinstance(named, Mapping) else None

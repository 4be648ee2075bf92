"""Check whether an answer has the requested `response_format`: JSON, or JSON that matches a schema. Pure.

An answer of another form was paid for, so it is stored, with the outcome "invalid". A schema is never
fetched over the network: with a `$ref` to another document nothing matches. jsonschema is imported where a
schema is used: few runs have one, and every run would begin later.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from harvester.errors import ConfigError
from harvester.system.limited_child import ChildError, for_text

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

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
    if problem := _problem(orjson.dumps(schema)):
        raise ConfigError(f"not a valid JSON Schema, {problem}", place="sampling.response_format")


@lru_cache(maxsize=64)
def _problem(schema: bytes) -> str:
    """What is wrong with a schema; "" for nothing."""
    from jsonschema import exceptions, validators

    loaded = orjson.loads(schema)
    try:
        validators.validator_for(loaded, default=validators.Draft202012Validator).check_schema(loaded)
    except exceptions.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its root"
        return f"at {where}: {error.message}"
    except RecursionError:
        return "it is nested too deep"
    return ""


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
    encoded = orjson.dumps(schema)
    if len(text) <= INLINE_CHARS and not _is_costly(encoded):
        return is_valid(text, encoded)
    try:
        return bool(for_text.call(f"{__name__}:is_valid", text, encoded, timeout_s=TIMEOUT_S))
    except (TimeoutError, MemoryError, ChildError):
        return False


def is_valid(text: str, schema: bytes) -> bool:
    """Whether a JSON text matches a schema. May take very long: call it through `matches`."""
    from referencing.exceptions import Unresolvable

    try:
        return _validator(schema).is_valid(orjson.loads(text))
    except (Unresolvable, RecursionError):
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


@lru_cache(maxsize=64)
def _validator(schema: bytes) -> Validator:
    from jsonschema import validators
    from referencing import Registry

    loaded = orjson.loads(schema)
    kind = validators.validator_for(loaded, default=validators.Draft202012Validator)
    # With its default registry the library would fetch a remote `$ref` over the network.
    return kind(loaded, registry=Registry())

"""Whether an answer has the form that was asked for: JSON, or JSON by a schema. Pure.

An answer of another form was paid all the same: it is stored, with the outcome "invalid". A schema is never
fetched: a `$ref` to elsewhere fits nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson
from jsonschema import exceptions, validators
from jsonschema.protocols import Validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from harvester.errors import ConfigError


def check(response_format: Mapping[str, Any] | None) -> None:
    """Refuse a `response_format` that no answer could be checked against.

    Raises:
        ConfigError: its schema is none.
    """
    schema = _schema(response_format or {})
    if schema is None:
        return
    try:
        validators.validator_for(schema, default=validators.Draft202012Validator).check_schema(schema)
    except exceptions.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its root"
        raise ConfigError(
            f"no JSON Schema, at {where}: {error.message}", place="sampling.response_format"
        ) from None


def fits(text: str, response_format: Any) -> bool:
    """Whether a text is what `response_format` asks for; every text fits where nothing is asked."""
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
    try:
        return _validator(orjson.dumps(schema)).is_valid(value)
    except (Unresolvable, RecursionError):
        return False


def _schema(response_format: Mapping[str, Any]) -> Any:
    named = response_format.get("json_schema")
    return named.get("schema") if isinstance(named, Mapping) else None


@lru_cache(maxsize=64)
def _validator(schema: bytes) -> Validator:
    loaded = orjson.loads(schema)
    kind = validators.validator_for(loaded, default=validators.Draft202012Validator)
    # Without a registry of its own the library would fetch a remote `$ref` over the network.
    return kind(loaded, registry=Registry())

"""Check JSON Schemas, and JSON texts against them. Nothing is ever fetched over the network.

jsonschema is imported where a schema is used: few runs have one, and every run would begin later.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from harvester.system.limited_child import for_text

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


def encoded(schema: Any) -> bytes:
    """Return a schema as JSON, the form that the functions here take."""
    return orjson.dumps(schema)


@lru_cache(maxsize=64)
def problem(schema: bytes) -> str:
    """Return what is wrong with a schema; "" for nothing."""
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


def is_valid(text: str, schema: bytes) -> bool:
    """Whether a JSON text matches a schema. May take very long: call it in a child with limits.

    Raises:
        orjson.JSONDecodeError: the text is no JSON.
    """
    from referencing.exceptions import Unresolvable

    try:
        return _validator(schema).is_valid(orjson.loads(text))
    except (Unresolvable, RecursionError):
        return False


def is_valid_within(text: str, schema: bytes, timeout_s: float) -> bool:
    """Return `is_valid` from a child process with limits.

    Raises:
        TimeoutError: it takes longer than `timeout_s`.
        MemoryError: it needs more memory than the child may have, or the child died.
        ChildError: `is_valid` raised.
    """
    return bool(for_text.call(f"{__name__}:is_valid", text, schema, timeout_s=timeout_s))


@lru_cache(maxsize=64)
def _validator(schema: bytes) -> Validator:
    from jsonschema import validators
    from referencing import Registry

    loaded = orjson.loads(schema)
    kind = validators.validator_for(loaded, default=validators.Draft202012Validator)
    # With its default registry the library would fetch a remote `$ref` over the network.
    return kind(loaded, registry=Registry())

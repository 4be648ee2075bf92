"""Check JSON Schemas, and JSON texts against them. Nothing is ever fetched over the network.

jsonschema is imported where a schema is used: few runs have one, and every run would begin later.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import orjson

from harvester.system.limited_child import for_text

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


# Members that hold values of answers: a `$ref` in them is a name like any other.
_DATA_MEMBERS = frozenset({"const", "enum", "default", "examples"})


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
        return _unresolved(loaded)
    except exceptions.SchemaError as error:
        where = "/".join(map(str, error.absolute_path)) or "its root"
        return f"at {where}: {error.message}"
    except RecursionError:
        return "it is nested too deep"


def _unresolved(schema: Any) -> str:
    """Return which reference of a schema leads nowhere: no answer would match; "" for none.

    Schemas that name parts of themselves by `$id` are not looked at.
    """
    from jsonschema import validators
    from referencing import Registry
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    found = list(_strings_of(schema, ("$ref", "$id", "id", "$anchor", "$dynamicAnchor")))
    references = {text for name, text in found if name == "$ref"}
    if len(references) == 0 or any(name != "$ref" for name, _ in found):
        return ""
    resolver = Registry().resolver_with_root(DRAFT202012.create_resource(schema))
    unknown: Any = None
    for reference in sorted(references):
        if validators.validator_for({"$schema": reference}, default=unknown) is not unknown:
            continue  # the schema of schemas, which is at hand
        try:
            resolver.lookup(reference)
        except (Unresolvable, ValueError, TypeError, KeyError, IndexError, AttributeError):
            return f"its $ref {reference!r} leads nowhere (another document is never fetched)"
    return ""


def _strings_of(schema: Any, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the members of a schema with these names and a text, at any depth but in examples and values."""
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from ((name, value[name]) for name in names if isinstance(value.get(name), str))
            waiting.extend(part for name, part in value.items() if name not in _DATA_MEMBERS)
        elif isinstance(value, list):
            waiting.extend(value)


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

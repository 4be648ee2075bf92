"""Write the tool calls of an answer as a turn of OpenAI's chat format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from harvester.api.types import Message
from harvester.store.shards.schema import Sample


def tool_turn(sample: Sample) -> Message | None:
    """Return the members of an assistant turn that hold the answer's tool calls; None if not understood.

    Recognised are `tool_calls`, the older `function_call`, and `tool_use` parts.
    """
    try:
        value = orjson.loads(sample.tool_calls_json or "null")
    except orjson.JSONDecodeError:
        return None
    if isinstance(value, Mapping) and "name" in value:
        function = _function(value)
        return None if function is None else {"function_call": function}
    calls = [_call(entry) for entry in value] if isinstance(value, list) else []
    if not calls or None in calls:
        return None
    return {"tool_calls": calls}


def _call(entry: Any) -> dict[str, Any] | None:
    if not isinstance(entry, Mapping):
        return None
    inner = entry.get("function")
    function = _function(inner if isinstance(inner, Mapping) else entry)
    if function is None:
        return None
    identity = entry.get("id") or entry.get("call_id")
    return {**({"id": identity} if identity else {}), "type": "function", "function": function}


def _function(value: Mapping[str, Any]) -> dict[str, str] | None:
    """Return name and arguments; the arguments are JSON text, also where the answer had an object."""
    name = value.get("name")
    arguments = next((value[key] for key in ("arguments", "input", "args") if key in value), "{}")
    if not isinstance(name, str) or not name:
        return None
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": text}

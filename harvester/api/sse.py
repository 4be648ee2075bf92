"""Assemble the server-sent events of a streamed answer into the body of an unstreamed one. Pure.

A stream that was cut off looks like a clean end of file, so it counts as complete only with a finish reason
and either `[DONE]` or a usage chunk. Anything less is a broken connection, possibly billed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from harvester.api.error_body import error_inside, excerpt
from harvester.errors import BrokenAnswer, ConnectionBroken

_FIELDS = (b"data:", b"event:", b"id:", b"retry:", b":")
DONE = b"[DONE]"
_TEXT_FIELDS = ("content", "refusal", "reasoning_content", "reasoning")


def is_stream(raw: bytes) -> bool:
    """Whether these bytes are events. No JSON text starts like one."""
    return raw[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(_FIELDS)


def assemble(raw: bytes) -> dict[str, Any]:
    """Join the chunks of choice 0 into one `chat.completion` document.

    Raises:
        ConnectionBroken: the stream ended before its answer did.
        BrokenAnswer: an event is not a JSON object.
        TeacherError: one of the events is an error.
    """
    whole: dict[str, Any] = {}
    choice: dict[str, Any] | None = None
    done = False
    for data in events(raw):
        if data == DONE:
            done = True
            break
        chunk = _chunk(data, raw)
        error = error_inside(chunk, raw)
        if error is not None:
            error.maybe_billed = choice is not None
            raise error
        choices = chunk.get("choices")
        if isinstance(choices, list):
            choice = _join_choice(choice, choices)
            choices = whole.get("choices", [])
        whole |= {name: value for name, value in chunk.items() if value is not None or name not in whole}
        if choices is not None:
            whole["choices"] = choices
    if not done and not whole.get("usage"):
        raise _cut_off("neither [DONE] nor usage", raw)
    if choice is not None:
        if not choice.get("finish_reason"):
            raise _cut_off("no finish reason", raw)
        whole["choices"] = [choice]
    return whole


def events(raw: bytes) -> Iterator[bytes]:
    """The data of each event; comments, ids and event names are skipped."""
    lines: list[bytes] = []
    for line in raw.removeprefix(b"\xef\xbb\xbf").splitlines():
        if line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
        elif not line and lines:
            yield b"\n".join(lines)
            lines = []
    if lines:
        yield b"\n".join(lines)


def _chunk(data: bytes, raw: bytes) -> dict[str, Any]:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        chunk = None
    if not isinstance(chunk, dict):
        shown = excerpt(data[:200].decode("utf-8", "replace"))
        raise BrokenAnswer(f"an event is not JSON: {shown}", status=200, raw=raw, maybe_billed=True)
    return chunk


def _join_choice(choice: dict[str, Any] | None, parts: list[Any]) -> dict[str, Any] | None:
    """Choice 0 after these parts. Other choices were not asked for and are left out."""
    for part in parts:
        if not isinstance(part, dict) or part.get("index", 0) != 0:
            continue
        if choice is None:
            choice = {"index": 0, "message": {}, "finish_reason": None, "logprobs": None}
        if part.get("finish_reason") is not None:
            choice["finish_reason"] = part["finish_reason"]
        _add_message(choice["message"], part.get("delta") or part.get("message"))
        _add_logprobs(choice, part.get("logprobs"))
    return choice


def _add_message(message: dict[str, Any], delta: Any) -> None:
    for name, value in (delta if isinstance(delta, dict) else {}).items():
        if name in _TEXT_FIELDS and isinstance(value, str):
            message[name] = (message.get(name) or "") + value
        elif name == "tool_calls" and isinstance(value, list):
            _add_tool_calls(message.setdefault("tool_calls", []), value)
        elif value is not None or name not in message:
            message[name] = value


def _add_tool_calls(calls: list[dict[str, Any]], parts: list[Any]) -> None:
    """Join tool calls by index: names come whole, arguments in pieces."""
    for part in parts:
        if not isinstance(part, dict):
            continue
        index = part.get("index", len(calls))
        known = next((call for call in calls if call.get("index") == index), None)
        if known is None:
            calls.append({**part, "index": index})
            continue
        function, more = known.setdefault("function", {}), part.get("function")
        for name, value in (more if isinstance(more, dict) else {}).items():
            if name == "arguments" and isinstance(value, str):
                function[name] = (function.get(name) or "") + value
            elif value is not None:
                function[name] = value


def _add_logprobs(choice: dict[str, Any], logprobs: Any) -> None:
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if isinstance(content, list):
        if choice["logprobs"] is None:
            choice["logprobs"] = {"content": []}
        choice["logprobs"]["content"].extend(content)


def _cut_off(missing: str, raw: bytes) -> ConnectionBroken:
    return ConnectionBroken(
        f"the stream ended before its answer did ({missing})", status=200, raw=raw, maybe_billed=True
    )

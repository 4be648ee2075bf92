"""Find the choices of a body, in any known envelope or format of another API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harvester.api.shapes.finish import finish_word
from harvester.api.shapes.parts import NESTED_MEMBERS, REASONING_MEMBERS

# Members that hold the whole answer in a vendor's envelope.
ENVELOPES = ("data", "result", "response", "Response", "output", "body")
# Members with the text of the whole answer, where there are neither choices nor a message; all but the first
# only next to a finish word.
BARE_TEXT_MEMBERS = ("generated_text", "output_text", "completion", "text", "response", "content")

# A message has at least one of these; beside reasoning or tool calls, a server may leave out the text.
_OF_MESSAGE = frozenset({"content", "role", "tool_calls", *REASONING_MEMBERS})

_MAX_ENVELOPES = 3


def choices_of(document: Mapping[str, Any]) -> tuple[list[Any] | None, Mapping[str, Any]]:
    """Return the choices of a body in any known envelope, and the object they are in; None for none."""
    return _choices_of(document, 0) or (None, document)


def _choices_of(document: Mapping[str, Any], depth: int) -> tuple[list[Any], Mapping[str, Any]] | None:
    choices = _given_choices(document.get("choices")) or _other_choices(document)
    if choices:
        return choices, document
    for name in ENVELOPES if depth < _MAX_ENVELOPES else ():
        inner = document.get(name)
        if isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        choices_inside = _choices_of(inner, depth + 1) if isinstance(inner, Mapping) else None
        if choices_inside is not None:
            return choices_inside
    bare = _bare_text(document)
    return ([bare], document) if bare else None


def _given_choices(choices: Any) -> list[Any]:
    if isinstance(choices, Mapping):
        return [choices] if {"message", "delta", "text"} & choices.keys() else list(choices.values())
    return choices if isinstance(choices, list) else []


def _other_choices(document: Mapping[str, Any]) -> list[Any]:
    """What stands for choices in the formats of other APIs."""
    candidates, output = document.get("candidates"), document.get("output")
    if isinstance(candidates, list) and candidates:
        return [_candidate(item) for item in candidates]
    if isinstance(output, list) and output:
        return [_of_items(output, document)]
    message = document.get("message")
    if isinstance(message, Mapping) and message.keys() & _OF_MESSAGE:
        return [{"message": message, "finish_reason": _finish_of_envelope(document)}]
    return []


def _bare_text(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The choice of a body that holds its text and its finish word in members of its own."""
    word = _finish_of_envelope(document)
    for name in BARE_TEXT_MEMBERS if word else BARE_TEXT_MEMBERS[:1]:
        value = document.get(name)
        if isinstance(value, str) or (name == "content" and isinstance(value, list)):
            elsewhere = {key: document[key] for key in NESTED_MEMBERS if isinstance(document.get(key), list)}
            if isinstance(document.get("message"), Mapping):  # it may be the answer, in a form of its own
                elsewhere["message"] = document["message"]
            return {"message": {**elsewhere, "content": value}, "finish_reason": word}
    return None


def _candidate(item: Any) -> Any:
    """A candidate of Gemini's own API as a choice."""
    if not isinstance(item, Mapping):
        return item
    content = item.get("content")
    return {
        "index": item.get("index", 0),
        "message": {"content": content},
        "finish_reason": finish_word(item),
    }


def _of_items(items: list[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """The items of OpenAI's Responses API as one choice."""
    content: list[Any] = []
    for item in items:
        is_message = isinstance(item, Mapping) and item.get("type", "message") == "message"
        content.append(item.get("content") if is_message else item)
    return {"message": {"content": content}, "finish_reason": _finish_of_envelope(document)}


def _finish_of_envelope(document: Mapping[str, Any]) -> str:
    word = finish_word(document)
    details = document.get("incomplete_details")
    if not word and isinstance(details, Mapping):
        word = finish_word({"finish_reason": details.get("reason")})
    status = document.get("status")
    if not word and isinstance(status, str):
        word = status
    return word

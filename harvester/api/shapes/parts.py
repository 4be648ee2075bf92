"""Read the parts of a message: text, reasoning, refusals and tool calls, in whatever form they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

# Members of a message that hold reasoning. The first with text counts: several servers send it twice.
REASONING_MEMBERS = (
    "reasoning_content",
    "reasoning",
    "thinking",
    "thought",
    "thoughts",
    "reasoning_text",
    "reasoning_details",
    "thinking_blocks",
    "reasoning_summary",
)
# Types of the parts of a content list.
TEXT_PARTS = frozenset({"text", "output_text", "input_text", "text_delta", "markdown"})
REASONING_PARTS = frozenset(
    {
        "thinking",
        "thinking_delta",
        "reasoning",
        "reasoning_text",
        "reasoning_content",
        "reasoning.text",
        "reasoning.summary",
        "summary_text",
        "thought",
    }
)
REFUSAL_PARTS = frozenset({"refusal"})
TOOL_PARTS = frozenset({"tool_use", "tool_call", "function_call", "function"})
# Parts that hold no text of the answer.
SILENT_PARTS = frozenset(
    {"redacted_thinking", "reasoning.encrypted", "reference", "citation", "signature", "signature_delta"}
)
# Members of a part, or of an object in place of text, that hold its text; the first that is there counts.
TEXT_MEMBERS = ("text", "value", "output_text", "content", "parts")
REASONING_TEXT_MEMBERS = ("thinking", "reasoning", "reasoning_content", "text", "summary", "content", "value")
# Members that hold answers elsewhere. Inside a message, next to its content, they are not understood.
NESTED_MEMBERS = ("message", "delta", "choices", "value", "parts", "output_text")

# Members that an object in place of text may have beside its text.
_BESIDE_TEXT = frozenset(
    {"type", "role", "id", "index", "logprobs", "annotations", "citations", "signature", "metadata"}
    | {"thought", "thought_signature", "thoughtSignature", "cache_control", "extra_content"}
    | {*TEXT_MEMBERS, *REASONING_TEXT_MEMBERS, *REASONING_MEMBERS, *NESTED_MEMBERS}
)
_MAX_DEPTH = 8


class Role(Enum):
    """What the text of a part is."""

    TEXT = "text"
    REASONING = "reasoning"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=True)
class Content:
    """What a content field holds, in pieces.

    Attributes:
        understood: whether every element of it was recognised.
    """

    text: tuple[str, ...] = ()
    reasoning: tuple[str, ...] = ()
    refusal: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()
    understood: bool = True


_NOTHING = Content()
_NOT_UNDERSTOOD = Content(understood=False)


def read_content(value: Any) -> Content:
    """Read a content field: text, a list of parts, a part, or nothing."""
    return _read(value, Role.TEXT, 0)


def read_reasoning(value: Any) -> tuple[str | None, bool]:
    """Return the text of a reasoning field, and whether it was understood."""
    if not value:  # null, "", {}, [], false: there is none
        return None, True
    content = _read(value, Role.REASONING, 0)
    text = "".join((*content.text, *content.reasoning))
    return text or None, content.understood


def _read(value: Any, role: Role, depth: int) -> Content:
    """Read a value. `role` is what its text is, unless the type of a part says otherwise."""
    if isinstance(value, str):
        return _CONTENT_OF[role](value)
    if value is None:
        return _NOTHING
    if depth >= _MAX_DEPTH:
        return _NOT_UNDERSTOOD
    if isinstance(value, list):
        return _join([_read(item, role, depth + 1) for item in value])
    if isinstance(value, Mapping):
        kind = value.get("type")
        is_type = kind is None or isinstance(kind, str)
        return (_PART_READERS.get(kind, _unknown_part) if is_type else _unknown_part)(value, role, depth)
    return _NOT_UNDERSTOOD


def _join(contents: Sequence[Content]) -> Content:
    if len(contents) == 1:
        return contents[0]
    return Content(
        tuple(piece for content in contents for piece in content.text),
        tuple(piece for content in contents for piece in content.reasoning),
        tuple(piece for content in contents for piece in content.refusal),
        tuple(tool for content in contents for tool in content.tools),
        all(content.understood for content in contents),
    )


_CONTENT_OF: Mapping[Role, Callable[[str], Content]] = {
    Role.TEXT: lambda text: Content(text=(text,)),
    Role.REASONING: lambda text: Content(reasoning=(text,)),
    Role.REFUSAL: lambda text: Content(refusal=(text,)),
}


def _member(part: Mapping[str, Any], role: Role, depth: int) -> Content:
    """Read the first member of a part that may hold text of this role.

    Several texts are not understood, nor is one next to a member that may hold another answer.
    """
    name = next((name for name in _MEMBERS[role] if name in part), None)
    if name is None:
        return _NOT_UNDERSTOOD
    content = _read(part[name], role, depth + 1)
    is_one = role is not Role.TEXT or not any(part.get(other) for other in _TEXT_HOLDERS if other != name)
    return content if is_one else replace(content, understood=False)


def _silent_part(_part: Mapping[str, Any], _role: Role, _depth: int) -> Content:
    return _NOTHING


def _tool_part(part: Mapping[str, Any], _role: Role, _depth: int) -> Content:
    return Content(tools=(dict(part),))


def _refusal_part(part: Mapping[str, Any], _role: Role, depth: int) -> Content:
    return _member(part, Role.REFUSAL, depth)


def _reasoning_part(part: Mapping[str, Any], _role: Role, depth: int) -> Content:
    return _member(part, Role.REASONING, depth)


def _text_part(part: Mapping[str, Any], role: Role, depth: int) -> Content:
    return _member(part, _role_of_thought(part, role), depth)


def _untyped_part(part: Mapping[str, Any], role: Role, depth: int) -> Content:
    thoughts = [name for name in REASONING_MEMBERS if name in part and not isinstance(part[name], bool)]
    if not any(name in part for name in TEXT_MEMBERS):
        return _text_part(part, Role.REASONING if thoughts else role, depth)
    content = _text_part(part, role, depth)
    if role is Role.TEXT and any(part[name] for name in part.keys() - _BESIDE_TEXT):
        return replace(content, understood=False)  # it may be a JSON answer with a member of that name
    if role is not Role.TEXT or not thoughts:
        return content
    return _join([content, *(_read(part[name], Role.REASONING, depth + 1) for name in thoughts)])


def _unknown_part(part: Mapping[str, Any], role: Role, depth: int) -> Content:
    """Read the text of a part of unknown type. In a reasoning field any type will do."""
    role = _role_of_thought(part, role)
    content = _member(part, role, depth)
    return content if role is Role.REASONING else replace(content, understood=False)


def _role_of_thought(part: Mapping[str, Any], role: Role) -> Role:
    """Gemini marks a part that holds reasoning with `thought`."""
    return Role.REASONING if part.get("thought") is True else role


_PartReader = Callable[[Mapping[str, Any], Role, int], Content]
# By the `type` of a part.
_PART_READERS: Mapping[str | None, _PartReader] = {
    None: _untyped_part,
    **dict.fromkeys(TEXT_PARTS, _text_part),
    **dict.fromkeys(REASONING_PARTS, _reasoning_part),
    **dict.fromkeys(REFUSAL_PARTS, _refusal_part),
    **dict.fromkeys(TOOL_PARTS, _tool_part),
    **dict.fromkeys(SILENT_PARTS, _silent_part),
}
_MEMBERS: Mapping[Role, tuple[str, ...]] = {
    Role.TEXT: TEXT_MEMBERS,
    Role.REASONING: REASONING_TEXT_MEMBERS,
    Role.REFUSAL: ("refusal", *TEXT_MEMBERS),
}
_TEXT_HOLDERS = frozenset({*TEXT_MEMBERS, *NESTED_MEMBERS})

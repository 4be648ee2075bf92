"""Define which shapes of an answer are recognised, and read their parts. Pure.

Servers that call themselves compatible spell the same facts in many ways: text as a string, a list of parts
or an object; reasoning in a field, in a part or between tags inside the text; ends by many words; the whole
answer inside an envelope. The tables here list what is recognised. `data/FORMAT.md` shows the same tables,
and a test compares the two. What is not recognised is kept in `raw` and reported as not understood: such an
answer never gets the outcome `ok`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from typing import Any


class Finish(StrEnum):
    """What a finish word says about the answer."""

    END = "end"  # the answer is complete
    TOOLS = "tools"  # the answer is a tool call
    CUT = "cut"  # a limit on tokens cut it
    FILTER = "filter"  # content moderation withheld it
    REFUSAL = "refusal"  # the model refused
    BROKEN = "broken"  # generation failed on the way: the request is tried again


# Finish words, without case and punctuation: `max_tokens`, `MAX_TOKENS` and `maxTokens` are one word.
FINISH_WORDS: dict[str, Finish] = {
    **dict.fromkeys(
        (
            "stop",
            "stopped",
            "stopsequence",
            "stopstring",
            "stoptoken",
            "eos",
            "eostoken",
            "eot",
            "endturn",
            "endofturn",
            "endoftext",
            "endofsequence",
            "eotid",
            "imend",
            "end",
            "ended",
            "complete",
            "completed",
            "finish",
            "finished",
            "done",
            "succeeded",
            "success",
            "normal",
        ),
        Finish.END,
    ),
    **dict.fromkeys(("toolcalls", "toolcall", "tooluse", "functioncall"), Finish.TOOLS),
    **dict.fromkeys(
        (
            "length",
            "lengthlimit",
            "maxtokens",
            "maxlength",
            "maxnewtokens",
            "maxoutputtokens",
            "maxtokensreached",
            "modellength",
            "modelcontextwindowexceeded",
            "contextlengthexceeded",
            "contextwindowexceeded",
            "tokenlimit",
            "truncated",
            "incomplete",
            "errorlimit",
        ),
        Finish.CUT,
    ),
    **dict.fromkeys(
        (
            "contentfilter",
            "contentfiltered",
            "filtered",
            "filter",
            "safety",
            "sensitive",
            "moderation",
            "moderated",
            "flagged",
            "recitation",
            "blocklist",
            "blocked",
            "prohibitedcontent",
            "spii",
            "imagesafety",
            "guardrailintervened",
            "errortoxic",
        ),
        Finish.FILTER,
    ),
    **dict.fromkeys(("refusal", "refused"), Finish.REFUSAL),
    **dict.fromkeys(
        (
            "error",
            "networkerror",
            "servererror",
            "internalerror",
            "abort",
            "aborted",
            "cancel",
            "cancelled",
            "canceled",
            "usercancel",
            "interrupted",
            "insufficientsystemresource",
            "failed",
            "failure",
            "timeout",
            "overloaded",
            "ratelimit",
        ),
        Finish.BROKEN,
    ),
}
# Members that hold the finish word, in the order in which they are asked.
FINISH_MEMBERS = (
    "finish_reason",
    "finishReason",
    "stop_reason",
    "stopReason",
    "done_reason",
    "native_finish_reason",
)
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
# Tags around reasoning inside the text: opening and closing.
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
# Members that hold the whole answer in a vendor's envelope.
ENVELOPES = ("data", "result", "response", "Response", "output", "body")
# Members with the text of the whole answer, where there are neither choices nor a message; all but the first
# only next to a finish word.
BARE_TEXT_MEMBERS = ("generated_text", "output_text", "completion", "text", "response", "content")

_MAX_DEPTH = 8
_MAX_ENVELOPES = 3
_WORD = re.compile(r"[^a-z0-9]+")
_MARK = re.compile(
    "|".join(re.escape(tag) for pair in THINK_TAGS for tag in sorted(pair, key=len, reverse=True)),
    re.IGNORECASE,
)
_QUOTES = frozenset({('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"), ("„", "”")})
_CLOSING = {opening.lower(): closing.lower() for opening, closing in THINK_TAGS}


def finish_of(word: Any) -> Finish | None:
    """What a finish word says; None for one that is not in the table."""
    if not isinstance(word, str):
        return None
    if word.strip() == "</s>":
        return Finish.END
    plain = _WORD.sub("", word.lower())
    return FINISH_WORDS.get(plain.removeprefix("finishreason") or plain)


def finish_word(*holders: Mapping[str, Any]) -> str:
    """The teacher's own finish word: of the first member that has one, "" where none has."""
    for holder in holders:
        for name in FINISH_MEMBERS:
            value = holder.get(name)
            if isinstance(value, Mapping):
                value = next(
                    (value[key] for key in ("type", "reason", *FINISH_MEMBERS) if value.get(key)), None
                )
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                return str(value)
    return ""


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
    """The text of a reasoning field, and whether it was understood."""
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
    """Read the first member of a part that may hold text of this role; several texts are not understood."""
    name = next((name for name in _MEMBERS[role] if name in part), None)
    if name is None:
        return _NOT_UNDERSTOOD
    content = _read(part[name], role, depth + 1)
    is_one = role is not Role.TEXT or sum(bool(part.get(other)) for other in _MEMBERS[role]) < 2
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


def split_thoughts(text: str) -> tuple[str, str | None, bool]:
    """Take reasoning between tags out of an answer's text.

    Recognised are blocks at the start of the text or of a line, an opening tag without its closing one (the
    rest is reasoning: the answer was cut in it), and a closing tag without its opening one (what precedes is
    reasoning: the opening tag was part of the prompt). Tags in code or between quotes are text; but where
    nothing else ends a block, the only closing tag does, as reasoning may hold half a quote.

    Returns:
        The text without them, the reasoning (None for none), and whether no tag was left that may be either.
    """
    if _MARK.search(text) is None:
        return text, None, True
    blocks = _ThoughtBlocks(text)
    for match, is_literal in _marks(text):
        blocks.add(match, is_literal=is_literal)
    blocks.end()
    if not blocks.thoughts:
        return text, None, blocks.is_clear
    rest = "".join(part if number == 0 else part.lstrip() for number, part in enumerate(blocks.kept))
    thoughts = "\n\n".join(part.strip() for part in blocks.thoughts if part.strip())
    return rest.lstrip(), thoughts or None, blocks.is_clear


class _ThoughtBlocks:
    """The blocks of reasoning in a text, tag by tag.

    Attributes:
        kept: pieces of the text outside of blocks.
        thoughts: what is in the blocks.
        is_clear: whether no tag was left that may begin or end a block.
    """

    def __init__(self, text: str) -> None:
        self.kept: list[str] = []
        self.thoughts: list[str] = []
        self.is_clear = True
        self._text = text
        self._at = 0
        self._closing = ""
        self._literal_ends: list[re.Match[str]] = []

    def add(self, match: re.Match[str], *, is_literal: bool) -> None:
        """Add the next tag; a literal one is in code or between quotes."""
        mark = match.group().lower()
        if self._closing:
            if mark == self._closing and is_literal:
                self._literal_ends.append(match)
            elif mark == self._closing:
                self._close(match)
        elif is_literal:
            return
        elif mark in _CLOSING:
            self._open(match, _CLOSING[mark])
        elif self.is_clear and not self.thoughts and not self.kept:
            self._close(match)
        else:
            self.is_clear = False

    def end(self) -> None:
        """Add the rest of the text."""
        if self._closing and self._literal_ends:
            self.is_clear = self.is_clear and len(self._literal_ends) == 1
            self._close(self._literal_ends[0])
        (self.thoughts if self._closing else self.kept).append(self._text[self._at :])

    def _open(self, match: re.Match[str], closing: str) -> None:
        before = self._text[self._at : match.start()]
        if before.strip() and not before.rstrip(" \t").endswith("\n"):
            self.is_clear = False
            return
        self.kept.append(before)
        self._at, self._closing, self._literal_ends = match.end(), closing, []

    def _close(self, match: re.Match[str]) -> None:
        self.thoughts.append(self._text[self._at : match.start()])
        self._at, self._closing = match.end(), ""


def _marks(text: str) -> Iterator[tuple[re.Match[str], bool]]:
    """The tags of a text, and whether each is meant literally: in code, or between quotes."""
    fences, line_start, ticks, checked = 0, 0, 0, 0
    for match in _MARK.finditer(text):
        start = match.start()
        fences += text.count("```", checked, start)
        newline = text.rfind("\n", checked, start)
        if newline >= 0:
            line_start, ticks = newline + 1, 0
        ticks += text.count("`", max(checked, line_start), start)
        checked = start
        is_quoted = (text[start - 1 : start], text[match.end() : match.end() + 1]) in _QUOTES
        yield match, fences % 2 == 1 or ticks % 2 == 1 or is_quoted


def choices_of(document: Mapping[str, Any]) -> tuple[list[Any] | None, Mapping[str, Any]]:
    """The choices of a body in any known envelope, and the object they are in; None where there are none."""
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
    if isinstance(message, Mapping) and "content" in message:
        return [{"message": message, "finish_reason": _finish_of_envelope(document)}]
    return []


def _bare_text(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The choice of a body that holds its text and its finish word in members of its own."""
    word = _finish_of_envelope(document)
    for name in BARE_TEXT_MEMBERS if word else BARE_TEXT_MEMBERS[:1]:
        value = document.get(name)
        if isinstance(value, str) or (name == "content" and isinstance(value, list)):
            elsewhere = {key: document[key] for key in NESTED_MEMBERS if isinstance(document.get(key), list)}
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

"""Define which shapes of an answer are recognised, and read their parts. Pure.

Servers that call themselves compatible spell the same facts in many ways: text as a string, a list of parts
or an object; reasoning in a field, in a part or between tags inside the text; ends by many words; the whole
answer inside an envelope. The tables here list what is recognised. `data/FORMAT.md` shows the same tables,
and a test compares the two. What is not recognised is kept in `raw` and reported as not understood: such an
answer never gets the outcome `ok`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
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


@dataclass(slots=True)
class Content:
    """What a content field holds, in pieces.

    Attributes:
        understood: whether every element of it was recognised.
    """

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    tools: list[Any] = field(default_factory=list)
    understood: bool = True


def read_content(value: Any) -> Content:
    """Read a content field: text, a list of parts, a part, or nothing."""
    content = Content()
    _read(value, content, content.text, 0)
    return content


def read_reasoning(value: Any) -> tuple[str | None, bool]:
    """The text of a reasoning field, and whether it was understood."""
    if not value:  # null, "", {}, [], false: there is none
        return None, True
    content = Content()
    _read(value, content, content.reasoning, 0)
    text = "".join((*content.text, *content.reasoning))
    return text or None, content.understood


def _read(value: Any, content: Content, into: list[str], depth: int) -> None:
    """Append the text of a value to `into`, or to where the type of a part belongs."""
    if isinstance(value, str):
        into.append(value)
    elif value is None:
        return
    elif depth >= _MAX_DEPTH:
        content.understood = False
    elif isinstance(value, list):
        for item in value:
            _read(item, content, into, depth + 1)
    elif isinstance(value, Mapping):
        _read_part(value, content, into, depth)
    else:
        content.understood = False


def _read_part(part: Mapping[str, Any], content: Content, into: list[str], depth: int) -> None:
    kind = part.get("type")
    members: tuple[str, ...] = TEXT_MEMBERS
    if kind in SILENT_PARTS:
        return
    if kind in TOOL_PARTS:
        content.tools.append(dict(part))
        return
    if kind in REFUSAL_PARTS:
        into, members = content.refusal, ("refusal", *TEXT_MEMBERS)
    elif kind in REASONING_PARTS or part.get("thought") is True:
        into, members = content.reasoning, REASONING_TEXT_MEMBERS
    elif kind is None and into is not content.reasoning and not any(name in part for name in TEXT_MEMBERS):
        into, members = content.reasoning, ("thinking", "reasoning", "reasoning_content")
    elif into is content.reasoning:
        members = REASONING_TEXT_MEMBERS
    elif kind is not None and kind not in TEXT_PARTS:
        content.understood = False
    name = next((name for name in members if name in part), None)
    if name is None:
        content.understood = False
    else:
        _read(part[name], content, into, depth + 1)


def split_thoughts(text: str) -> tuple[str, str | None, bool]:
    """Take reasoning between tags out of an answer's text.

    Recognised are blocks at the start of the text or of a line, an opening tag without its closing one (the
    rest is reasoning: the answer was cut in it), and a closing tag without its opening one (what precedes is
    reasoning: the opening tag was part of the prompt). Tags in code or between quotes are text.

    Returns:
        The text without them, the reasoning (None for none), and whether no tag was left that may be either.
    """
    if _MARK.search(text) is None:
        return text, None, True
    kept: list[str] = []
    thoughts: list[str] = []
    at, is_clear, opened = 0, True, ""
    for match in _marks(text):
        mark = match.group().lower()
        if opened:
            if mark == _CLOSING[opened]:
                thoughts.append(text[at : match.start()])
                at, opened = match.end(), ""
        elif mark in _CLOSING:
            before = text[at : match.start()]
            if before.strip() and not before.rstrip(" \t").endswith("\n"):
                is_clear = False
                continue
            kept.append(before)
            at, opened = match.end(), mark
        elif is_clear and not thoughts and not kept:
            thoughts.append(text[at : match.start()])
            at = match.end()
        else:
            is_clear = False
    (thoughts if opened else kept).append(text[at:])
    if not thoughts:
        return text, None, is_clear
    rest = "".join(part if number == 0 else part.lstrip() for number, part in enumerate(kept))
    return rest.lstrip(), "\n\n".join(part.strip() for part in thoughts if part.strip()) or None, is_clear


def _marks(text: str) -> Iterator[re.Match[str]]:
    """The tags of a text that are neither in code nor between quotes."""
    fences, line_start, ticks, checked = 0, 0, 0, 0
    for match in _MARK.finditer(text):
        start = match.start()
        fences += text.count("```", checked, start)
        newline = text.rfind("\n", checked, start)
        if newline >= 0:
            line_start, ticks = newline + 1, 0
        ticks += text.count("`", max(checked, line_start), start)
        checked = start
        is_quoted = text[start - 1 : start] in {'"', "'", "“", "‘", "«"}
        if fences % 2 == 0 and ticks % 2 == 0 and not is_quoted:
            yield match


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
        found = _choices_of(inner, depth + 1) if isinstance(inner, Mapping) else None
        if found is not None:
            return found
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
            return {"message": {"content": value}, "finish_reason": word}
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

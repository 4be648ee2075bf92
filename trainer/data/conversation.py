"""Restore what a teacher was asked, messages and tools, in the form that chat templates expect.

The corpus' `messages` column holds role and text only. The request itself (`request_json`) also holds tool
schemas, tool calls, and contents in parts; a student must see all of them in its prompt. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harvester.store.shards.schema import Sample, text_of

Message = Mapping[str, Any]

# Joins the text parts of one message, as vLLM and llama.cpp do for templates that take a single text.
PART_SEPARATOR = "\n"
# How the corpus' column of messages begins where it holds parts, as JSON.
_PARTS_IN_COLUMN = '[{"'
# Fields of a message that chat templates know besides role and content.
_EXTRA_FIELDS = ("name", "tool_call_id", "tool_calls", "reasoning_content", "reasoning", "thinking")


# Why a row can't be restored.
NOT_TEXT = "content that is not text"
CONTINUES = "continues an answer that was begun for the teacher"
# Names by which a message asks that it be continued (DeepSeek and Mistral; Qwen).
_BEGUN = ("prefix", "partial")


class UnsupportedContent(ValueError):
    """A row can't be restored; the message says why.

    A message has a content that is neither text nor a list of text parts, such as an image. Or the teacher
    went on with an answer that was begun for it: chat templates open a further one.
    """


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a teacher was asked, or what a student is asked.

    Attributes:
        messages: contents are text, arguments of tool calls are objects.
        tools: schemas of the tools that may be called.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def texts(self) -> Iterator[str]:
        """Yield every text that a prompt has to contain: contents, tool calls, names of tools."""
        for message in self.messages:
            yield str(message.get("content") or "")
            for call in message.get("tool_calls") or ():
                function = call.get("function", {})
                yield str(function.get("name") or "")
                arguments = function.get("arguments")
                if isinstance(arguments, Mapping):
                    yield from (value for value in arguments.values() if isinstance(value, str))
        for tool in self.tools:
            yield str(tool.get("function", tool).get("name") or "")


def as_conversation(prompt: Conversation | Sequence[Message]) -> Conversation:
    """Return a conversation, given one or a plain sequence of messages."""
    return prompt if isinstance(prompt, Conversation) else Conversation(tuple(prompt))


def request_beyond_columns(sample: Sample) -> str:
    """Return the part of a request that the `messages` column lacks, as JSON; "" if it lacks nothing."""
    request = _load_object(sample.request_json)
    messages, tools = request.get("messages"), request.get("tools")
    if not isinstance(messages, list):
        return ""
    is_plain = all(isinstance(m.get("content"), str) and set(m) <= {"role", "content"} for m in messages)
    # A text that looks like parts: only the request tells that it is none.
    is_plain = is_plain and not any(m["content"].startswith(_PARTS_IN_COLUMN) for m in messages)
    begun = _is_begun(request)
    if is_plain and not tools and not begun:
        return ""
    kept = {"messages": messages, "tools": tools or [], **({"continue_final_message": True} if begun else {})}
    return json.dumps(kept, ensure_ascii=False)


def conversation_of(sample: Sample, request_json: str | None = None) -> Conversation:
    """Restore what the teacher was asked for this row.

    Args:
        request_json: the row's request, or what `request_beyond_columns` leaves of it; None: its column.

    Raises:
        UnsupportedContent: a message holds something other than text.
    """
    request = _load_object(sample.request_json if request_json is None else request_json)
    messages = request.get("messages")
    if _is_begun(request):
        raise UnsupportedContent(CONTINUES)
    if isinstance(messages, list) and _columns(messages) == _columns(sample.messages):
        tools = tuple(tool for tool in request.get("tools") or () if isinstance(tool, Mapping))
        return Conversation(tuple(map(_normalised, messages)), tools)
    return Conversation(tuple({**m, "content": _text_of_column(m.get("content"))} for m in sample.messages))


def _is_begun(request: Mapping[str, Any]) -> bool:
    """Whether a request asks the teacher to go on with the last message, an answer that was begun for it."""
    messages = request.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        return False
    return request.get("continue_final_message") is True or any(last.get(name) is True for name in _BEGUN)


def _columns(messages: Sequence[Message]) -> list[tuple[Any, str]]:
    """The messages as the corpus' column holds them."""
    return [(m.get("role"), text_of(m.get("content")) or "") for m in messages]


def _load_object(text: str) -> Mapping[str, Any]:
    try:
        loaded = json.loads(text) if text else {}
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _normalised(message: Message) -> Message:
    extra = {name: message[name] for name in _EXTRA_FIELDS if message.get(name)}
    if "tool_calls" in extra:
        extra["tool_calls"] = [_with_argument_object(call) for call in extra["tool_calls"]]
    return {"role": message.get("role"), "content": _joined_text(message.get("content")), **extra}


def _joined_text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(map(_is_text_part, content)):
        raise UnsupportedContent(NOT_TEXT)
    return PART_SEPARATOR.join(part if isinstance(part, str) else part["text"] for part in content)


def _is_text_part(part: Any) -> bool:
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
    return isinstance(part, str) or (is_text and isinstance(part.get("text"), str))


def _text_of_column(content: str | None) -> str:
    """The text of a content whose request is not at hand; the column holds parts as JSON."""
    if content and content.startswith(_PARTS_IN_COLUMN):
        try:
            parts = json.loads(content)
        except ValueError:
            return content
        if all(isinstance(part, dict) and "type" in part for part in parts):
            return _joined_text(parts)
    return content or ""


def _with_argument_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse the arguments of a tool call: the wire sends them as JSON text, templates expect an object."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def why_not_restored(sample: Sample) -> str:
    """Return why `conversation_of` can't restore a row; "" if it can."""
    try:
        conversation_of(sample)
    except UnsupportedContent as error:
        return str(error)
    return ""


def can_be_restored(sample: Sample) -> bool:
    """Whether `conversation_of` can restore a row."""
    return not why_not_restored(sample)

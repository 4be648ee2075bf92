"""Convert a Sample to a row of an export format: TRL's two, OpenAI's fine-tuning lines, or ShareGPT.

Only OpenAI's format holds every field of a turn, tools, and answers that are tool calls. A row with more than
roles and texts fits no other format: it is left out, counted by what it has, and never changed silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
import pyarrow as pa

from harvester.api.types import Message
from harvester.export.tool_calls import tool_turn
from harvester.store.shards.schema import Sample

Shape = Literal["prompt-completion", "messages", "openai", "sharegpt"]
_SHAREGPT = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
_PLAIN = frozenset({"role", "content"})

_ROW_ID = (
    ("prompt_id", "string", "id of the prompt that was asked"),
    ("key", "string", "the answer's key in the corpus it came from"),
)
# The columns that Croissant can describe, by format; nested lists of messages in Parquet are left out.
COLUMNS: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "prompt-completion": _ROW_ID,
    "messages": _ROW_ID,
    "openai": (("messages", "json", "the conversation, the teacher's answer last; a list of messages"),),
    "sharegpt": (("conversations", "json", "the conversation, the teacher's answer last"),),
}


# Joins the text parts of one message in formats that hold a single text, as servers do for such templates.
PART_SEPARATOR = "\n"
# Fields of a request, besides the messages, that OpenAI's fine-tuning lines hold.
_REQUEST_FIELDS = ("tools", "parallel_tool_calls", "functions")


@dataclass(frozen=True, slots=True)
class SentRequest:
    """What the teacher was asked: turns exactly as sent, and the fields of `_REQUEST_FIELDS` that were."""

    turns: Sequence[Message]
    fields: Mapping[str, Any]


def asked_of(sample: Sample) -> SentRequest:
    """Return what was sent; the column `messages` has only roles and texts."""
    sent = orjson.loads(sample.request_json)
    fields = {name: sent[name] for name in _REQUEST_FIELDS if sent.get(name) not in (None, [])}
    return SentRequest(sent.get("messages") or sample.messages, fields)


def unfit(shape: str, sample: Sample, request: SentRequest) -> str:
    """Return why a row does not fit a format; "" if it does."""
    if sample.outcome == "tool_call":
        if shape != "openai":
            return "outcome_tool_call"
        return "" if tool_turn(sample) is not None else "tool_call_not_understood"
    if sample.outcome != "ok" or not sample.completion:
        return f"outcome_{sample.outcome}"
    if shape == "openai":
        return ""
    if request.fields:
        return "request_has_tools"
    return next((reason for turn in request.turns if (reason := _unfit_turn(turn))), "")


def _unfit_turn(turn: Message) -> str:
    further = sorted(name for name in turn.keys() - _PLAIN if turn[name] is not None)
    if further:
        return f"turn_has_{further[0]}"
    content = turn.get("content")
    if content is None:
        return "turn_without_content"
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, str | dict):
            return "turn_has_unknown_part"
        kind = "text" if isinstance(part, str) else part.get("type", "text")
        if kind != "text" or (isinstance(part, dict) and not isinstance(part.get("text"), str)):
            return f"turn_has_{kind}" if kind != "text" else "turn_has_unknown_part"
    return ""


def inlined(sample: Sample) -> Sample:
    """Return the sample with its reasoning put before the answer as text."""
    if not sample.reasoning:
        return sample
    return replace(sample, completion=f"<think>\n{sample.reasoning}\n</think>\n\n{sample.completion}")


def schema_of(shape: str, *, with_reasoning: bool) -> pa.Schema:
    """Return the schema of every Parquet file of an export, the same whatever its rows hold."""
    turn = [pa.field("role", pa.string()), pa.field("content", pa.string())]
    answer = [*turn, pa.field("reasoning_content", pa.string())] if with_reasoning else turn
    ids = [pa.field("prompt_id", pa.string()), pa.field("key", pa.string())]
    if shape == "messages":
        return pa.schema([pa.field("messages", pa.list_(pa.struct(answer))), *ids])
    sides = (("prompt", turn), ("completion", answer))
    return pa.schema([*(pa.field(name, pa.list_(pa.struct(kind))) for name, kind in sides), *ids])


def _answer(sample: Sample, reasoning: str | None) -> Message:
    answer = {"role": "assistant", "content": sample.completion}
    return {**answer, "reasoning_content": reasoning} if reasoning else answer


def _texts(request: SentRequest) -> list[Message]:
    return [{"role": turn["role"], "content": _text(turn["content"])} for turn in request.turns]


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return PART_SEPARATOR.join(part if isinstance(part, str) else str(part["text"]) for part in content)


def _prompt_completion(sample: Sample, request: SentRequest, reasoning: str | None) -> dict[str, Any]:
    return {
        "prompt": _texts(request),
        "completion": [_answer(sample, reasoning)],
        "prompt_id": sample.prompt_id,
        "key": sample.key,
    }


def _messages(sample: Sample, request: SentRequest, reasoning: str | None) -> dict[str, Any]:
    return {
        "messages": [*_texts(request), _answer(sample, reasoning)],
        "prompt_id": sample.prompt_id,
        "key": sample.key,
    }


def _openai(sample: Sample, request: SentRequest, reasoning: str | None) -> dict[str, Any]:
    answer = _answer(sample, reasoning)
    if sample.outcome == "tool_call":
        answer |= tool_turn(sample) or {}
    return {"messages": [*request.turns, answer], **request.fields}


def _sharegpt(sample: Sample, request: SentRequest, reasoning: str | None) -> dict[str, Any]:
    conversation = [*_texts(request), _answer(sample, reasoning)]
    return {
        "conversations": [
            {"from": _SHAREGPT.get(t["role"], t["role"]), "value": t["content"]} for t in conversation
        ]
    }


SHAPES: Mapping[str, Callable[[Sample, SentRequest, str | None], dict[str, Any]]] = {
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "openai": _openai,
    "sharegpt": _sharegpt,
}

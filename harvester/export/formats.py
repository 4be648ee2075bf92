"""Convert a Sample to a row of an export format: TRL's two, OpenAI's fine-tuning lines, or ShareGPT.

Only OpenAI's format holds every field of a turn. A row whose turns hold more than role and content fits no
other format: it is left out, counted by the field's name, and never changed silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import orjson
import pyarrow as pa

from harvester.api.types import Message
from harvester.store.shards.schema import Sample, text_of

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


def turns_of(sample: Sample) -> list[Message]:
    """Return the prompt's turns exactly as they were sent; the column `messages` has only roles and texts."""
    sent: list[Message] = orjson.loads(sample.request_json).get("messages") or sample.messages
    return sent


def unfit(shape: str, turns: Sequence[Message]) -> str:
    """Return why turns do not fit a format; "" if they do."""
    if shape == "openai":
        return ""
    for turn in turns:
        further = sorted(name for name in turn.keys() - _PLAIN if turn[name] is not None)
        if further:
            return f"turn_has_{further[0]}"
        if turn.get("content") is None:
            return "turn_without_content"
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


def _texts(turns: Sequence[Message]) -> list[Message]:
    return [{"role": turn["role"], "content": text_of(turn["content"])} for turn in turns]


def _prompt_completion(sample: Sample, turns: Sequence[Message], reasoning: str | None) -> dict[str, Any]:
    return {
        "prompt": _texts(turns),
        "completion": [_answer(sample, reasoning)],
        "prompt_id": sample.prompt_id,
        "key": sample.key,
    }


def _messages(sample: Sample, turns: Sequence[Message], reasoning: str | None) -> dict[str, Any]:
    return {
        "messages": [*_texts(turns), _answer(sample, reasoning)],
        "prompt_id": sample.prompt_id,
        "key": sample.key,
    }


def _openai(sample: Sample, turns: Sequence[Message], reasoning: str | None) -> dict[str, Any]:
    return {"messages": [*turns, _answer(sample, reasoning)]}


def _sharegpt(sample: Sample, turns: Sequence[Message], reasoning: str | None) -> dict[str, Any]:
    conversation = [*_texts(turns), _answer(sample, reasoning)]
    return {
        "conversations": [
            {"from": _SHAREGPT.get(t["role"], t["role"]), "value": t["content"]} for t in conversation
        ]
    }


SHAPES: Mapping[str, Callable[[Sample, Sequence[Message], str | None], dict[str, Any]]] = {
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "openai": _openai,
    "sharegpt": _sharegpt,
}

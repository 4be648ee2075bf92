"""Build OpenAI `chat.completion` objects from answers, whole or as stream events. No I/O."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import orjson

from harvester.mock_teacher import tokens
from harvester.mock_teacher.answers import MockAnswer
from harvester.mock_teacher.logprobs import token_logprobs
from harvester.mock_teacher.wire import ChatRequest

Completion = dict[str, Any]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of the prompt, as a model scores it; the first has no log-probability.

    `text` is lossy, as servers send it: part of a character is U+FFFD. `top` holds id, text and
    log-probability of the likeliest tokens.
    """

    number: int
    text: str
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """One choice after `stop` and `max_tokens`; `"".join(pieces)` is its text.

    `entries` is its `logprobs.content` from a model; for a rule task it is None and they are invented.
    `prompt` holds the tokens of the prompt where they were asked for.
    """

    pieces: list[str]
    finish_reason: str
    digest: bytes
    entries: list[dict[str, Any]] | None = None
    prompt: tuple[PromptToken, ...] = ()


# The answers to one request, before and after they are cut.
Solution = tuple[list[MockAnswer], list[Generated]]


@dataclass(frozen=True, slots=True)
class Identity:
    """The values that identify one reply: id, time, model, fingerprint."""

    response_id: str
    created: int
    model: str
    fingerprint: str


def generate(ask: ChatRequest, answers: Sequence[MockAnswer]) -> list[Generated]:
    """Cut the answers' texts at the first stop sequence, then at `max_tokens`."""
    return [_cut(answer, ask) for answer in answers]


def _cut(answer: MockAnswer, ask: ChatRequest) -> Generated:
    text = answer.text
    for word in ask.stop:
        text = text.partition(word)[0]
    pieces = tokens.split(text)
    if ask.max_tokens is not None and len(pieces) > ask.max_tokens:
        return Generated(pieces[: ask.max_tokens], "length", answer.digest)
    return Generated(pieces, "stop", answer.digest)


def usage(prompt_tokens: int, generated: Sequence[Generated]) -> dict[str, Any]:
    """Return the usage object: prompt tokens once, completion tokens of all choices."""
    completion_tokens = sum(len(answer.pieces) for answer in generated)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def completion(ask: ChatRequest, generated: Sequence[Generated], identity: Identity) -> Completion:
    """Return the `chat.completion` object."""
    document = {
        "id": identity.response_id,
        "object": "chat.completion",
        "created": identity.created,
        "model": identity.model,
        "choices": [_choice(ask, index, answer) for index, answer in enumerate(generated)],
        "usage": usage(ask.prompt_tokens, generated),
        "system_fingerprint": identity.fingerprint,
    }
    if ask.scoring.prompt_logprobs is not None:
        document["prompt_logprobs"] = prompt_logprobs(generated)
    return document


def prompt_logprobs(generated: Sequence[Generated]) -> list[dict[str, Any] | None] | None:
    """Return the tokens of the prompt in vLLM's form, by id and the token itself first; None: none scored."""
    if not generated or not generated[0].prompt:
        return None
    rows: list[dict[str, Any] | None] = []
    for token in generated[0].prompt:
        if token.logprob is None:
            rows.append(None)
            continue
        row = {str(token.number): _vllm_entry(token.logprob, token.rank, token.text)}
        for rank, (number, text, value) in enumerate(token.top, start=1):
            row.setdefault(str(number), _vllm_entry(value, rank, text))
        rows.append(row)
    return rows


def _vllm_entry(logprob: float, rank: int | None, text: str) -> dict[str, Any]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}


def _choice(ask: ChatRequest, index: int, answer: Generated) -> dict[str, Any]:
    entries = answer.entries
    if ask.logprobs and entries is None:
        entries = token_logprobs(answer.pieces, ask.top_logprobs, answer.digest)
    return {
        "index": index,
        "message": {"role": "assistant", "content": "".join(answer.pieces), "refusal": None},
        "logprobs": None if entries is None else {"content": entries, "refusal": None},
        "finish_reason": answer.finish_reason,
    }


def to_json(value: Any) -> bytes:
    """Encode as JSON; a fault script may contain integers above 64 bits."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value).encode()


def event(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def stream_events(document: Completion, include_usage: bool) -> list[bytes]:
    """Return a completion as server-sent events: role, one chunk per token, finish, usage, `[DONE]`.

    Works from the finished object, so that a spoilt completion streams spoilt in the same way; one
    without a list of choices goes out as a single event.
    """
    choices = document.get("choices")
    if not isinstance(choices, list):
        return [event(document), DONE]
    head = {key: value for key, value in document.items() if key not in ("choices", "usage")}
    head["object"] = "chat.completion.chunk"
    if include_usage:
        head["usage"] = None
    # A piece of each choice in turn, as they are generated together.
    turns = zip_longest(*(_chunks(choice) for choice in choices))
    chunks = (chunk for turn in turns for chunk in turn if chunk is not None)
    events = [event({**head, "choices": [chunk]}) for chunk in chunks]
    if include_usage and "usage" in document:
        events.append(event({**head, "choices": [], "usage": document["usage"]}))
    return [*events, DONE]


def _chunks(choice: dict[str, Any]) -> list[dict[str, Any]]:
    index = choice.get("index", 0)
    message = dict(choice.get("message") or {})
    content = message.pop("content", None)
    entries = (choice.get("logprobs") or {}).get("content")
    first = {key: value for key, value in message.items() if key == "role" or value is not None}
    deltas: list[tuple[dict[str, Any], Any, str | None]] = [(first, None, None)]
    if isinstance(content, str):
        own = [entry["token"] for entry in entries or ()]
        for at, piece in enumerate(own if "".join(own) == content else tokens.split(content)):
            logprobs = {"content": [entries[at]]} if entries and at < len(entries) else None
            deltas.append(({"content": piece}, logprobs, None))
    elif isinstance(content, list):
        deltas += [({"content": [part]}, None, None) for part in content]
    deltas.append(({}, None, choice.get("finish_reason")))
    return [
        {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        for delta, logprobs, finish in deltas
    ]

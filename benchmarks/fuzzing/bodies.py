"""Make valid bodies in the shapes of real servers, each with what must be stored of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

from . import texts

# Finish words by the outcome that they give. Written down here again: the oracle must not read our tables.
ENDS = ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "completed", "FINISH_REASON_STOP")
CUTS = ("length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "model_length", "incomplete")
FILTERS = ("content_filter", "SAFETY", "sensitive", "RECITATION", "blocklist")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought", "reasoning_text")


@dataclass(slots=True)
class Truth:
    """What must be stored of an answer.

    Attributes:
        text: as it must be stored; None for none.
        reasoning: as it must be stored; only its letters are compared, as separators may differ.
        outcome: the outcome.
        finish: the finish word that the body holds.
        tools: text of the tool call's arguments; "" for none.
    """

    text: str | None
    reasoning: str
    outcome: str
    finish: str
    tools: str = ""


@dataclass(slots=True)
class Body:
    """A body, its truth, and its chunks where it is a stream."""

    raw: bytes
    truth: Truth
    document: Any = None
    is_stream: bool = False
    has_snapshots: bool = False


def make_body(random: Random) -> Body:
    """Return a valid body in one of the shapes."""
    truth = _truth(random)
    maker = random.choice(_MAKERS)
    return maker(random, truth)


def _truth(random: Random) -> Truth:
    kind = random.random()
    thought = texts.reasoning(random) if random.random() < 0.35 else ""
    text = texts.answer(random)
    if kind < 0.75:
        return Truth(text, thought, "ok", random.choice(ENDS))
    if kind < 0.83:
        return Truth(text, thought, "truncated", random.choice(CUTS))
    if kind < 0.88:
        return Truth(text, thought, "filtered", random.choice(FILTERS))
    if kind < 0.93:
        return Truth(None, thought, "empty", random.choice(ENDS))
    return Truth(
        None, thought, "tool_call", random.choice(("tool_calls", "function_call")), texts.decoy(random)
    )


def encode(random: Random, value: Any) -> bytes:
    """Encode as JSON, in one of the ways that servers use."""
    separators = random.choice(((",", ":"), (", ", ": "), (" , ", " : ")))
    indent = random.choice((None, None, None, 1, 2))
    text = json.dumps(value, ensure_ascii=random.random() < 0.5, separators=separators, indent=indent)
    if random.random() < 0.1:
        text = text.replace("/", "\\/")
    return text.encode("utf-8", "surrogatepass")


def noise(random: Random) -> dict[str, Any]:
    """Return members that are no part of the answer."""
    names = ("logprobs", "annotations", "audio", "citations", "x_groq", "created", "object", "service_tier")
    values: tuple[Any, ...] = (None, [], {}, 0, 1.5, True, texts.decoy(random), [texts.decoy(random)])
    return {name: random.choice(values) for name in random.sample(names, random.randint(0, 3))}


def _shuffled(random: Random, value: dict[str, Any]) -> dict[str, Any]:
    names = list(value)
    random.shuffle(names)
    return {name: value[name] for name in names}


def _usage(random: Random) -> Any:
    full = {"prompt_tokens": random.randint(1, 99), "completion_tokens": random.randint(40, 99)}
    return random.choice((full, None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"input_tokens": 3}))


def _parts(random: Random, text: str, kind: str = "text") -> list[Any]:
    """Return a text as parts of a content list."""
    cut = sorted(random.randint(0, len(text)) for _ in range(random.randint(0, 2)))
    pieces = [text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)]
    member = "thinking" if kind == "thinking" else "text"
    return [{"type": kind, member: piece} for piece in pieces]


def _message(random: Random, truth: Truth) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    content: Any = truth.text
    style = random.random()
    if truth.reasoning and style < 0.3:
        tags = random.choice(
            (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))
        )
        safe = truth.reasoning.replace("<", "").replace(">", "")
        truth.reasoning = safe
        content = f"{tags[0]}{safe}{tags[1]}\n{truth.text or ''}"
    elif truth.reasoning and style < 0.5:
        content = [*_parts(random, truth.reasoning, "thinking"), *_parts(random, truth.text or "")]
    elif truth.reasoning:
        message[random.choice(REASONING_FIELDS)] = truth.reasoning
    if isinstance(content, str) and truth.text is not None:
        form = random.random()
        if form < 0.2:
            content = _parts(random, content)
        elif form < 0.25:
            content = {"type": "text", "text": content}
        elif form < 0.3:
            content = [content]
    message["content"] = content if content is not None else random.choice((None, "", []))
    if truth.tools:
        function = {"name": "f", "arguments": json.dumps({"x": truth.tools}, ensure_ascii=False)}
        if truth.finish == "function_call":
            message["function_call"] = function
        else:
            message["tool_calls"] = [{"id": "c1", "type": "function", "function": function}]
    return message


def _choice_document(random: Random, truth: Truth) -> dict[str, Any]:
    choice = {"index": 0, "message": _message(random, truth), "finish_reason": truth.finish}
    if random.random() < 0.2:
        choice |= {"native_finish_reason": random.choice(ENDS)}
    choices = [_shuffled(random, choice)]
    if random.random() < 0.15:
        other = {"index": 1, "message": {"content": texts.decoy(random)}, "finish_reason": "stop"}
        choices.insert(random.randint(0, 1), other)
    document = {"id": texts.decoy(random), "model": texts.decoy(random), "choices": choices}
    if random.random() < 0.7:
        document["usage"] = _usage(random)
    return _shuffled(random, {**noise(random), **document})


def _plain(random: Random, truth: Truth) -> Body:
    document: Any = _choice_document(random, truth)
    wrap = random.random()
    if wrap < 0.06:
        document = {"code": random.choice((0, 200, "0", "success")), "data": document}
    elif wrap < 0.1:
        document = {"result": document, "success": True}
    elif wrap < 0.12:
        document = [document]
    return Body(encode(random, document), truth, document)


def _legacy(random: Random, truth: Truth) -> Body:
    truth.reasoning, truth.tools = "", ""
    if truth.outcome == "tool_call":
        truth.outcome, truth.finish, truth.text = "ok", "stop", texts.answer(random)
    choice = {"index": 0, "text": truth.text if truth.text is not None else "", "finish_reason": truth.finish}
    document = {"id": texts.decoy(random), "choices": [choice], "usage": _usage(random)}
    return Body(encode(random, document), truth, document)


def _ollama(random: Random, truth: Truth) -> Body:
    truth.tools = ""
    if truth.outcome == "tool_call":
        truth.outcome, truth.finish, truth.text = "ok", "stop", texts.answer(random)
    message: dict[str, Any] = {"role": "assistant", "content": truth.text or ""}
    if truth.reasoning:
        message["thinking"] = truth.reasoning
    document = {"model": texts.decoy(random), "message": message, "done": True, "done_reason": truth.finish}
    return Body(encode(random, document), truth, document)


def _gemini(random: Random, truth: Truth) -> Body:
    truth.tools = ""
    if truth.outcome == "tool_call":
        truth.outcome, truth.finish, truth.text = "ok", "STOP", texts.answer(random)
    parts: list[Any] = [{"text": truth.reasoning, "thought": True}] if truth.reasoning else []
    parts += [{"text": truth.text}] if truth.text is not None else []
    candidate = {"content": {"parts": parts, "role": "model"}, "finishReason": truth.finish, "index": 0}
    document = {"candidates": [candidate], "usageMetadata": {"promptTokenCount": 5}, **noise(random)}
    return Body(encode(random, document), truth, document)


def _deltas(random: Random, truth: Truth) -> list[dict[str, Any]]:
    """Return the deltas of a stream."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if random.random() < 0.6 else []
    name = random.choice(REASONING_FIELDS)
    deltas += [{name: piece} for piece in _cut(random, truth.reasoning)]
    as_parts = random.random() < 0.15
    for piece in _cut(random, truth.text or ""):
        content: Any = [{"type": "text", "text": piece}] if as_parts else piece
        deltas.append({"content": content})
    if truth.tools:
        arguments = json.dumps({"x": truth.tools}, ensure_ascii=False)
        head = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
        deltas.append({"tool_calls": [head]})
        for piece in _cut(random, arguments):
            deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]})
        truth.finish = "tool_calls"
    return deltas


def _cut(random: Random, text: str) -> list[str]:
    """Return a text in pieces; none that a server that repeats itself could send, which are `unknown`."""
    while True:
        cuts = [0]
        while cuts[-1] < len(text):
            cuts.append(cuts[-1] + random.randint(1, 9))
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        if not _look_repeated(pieces):
            return pieces


def _look_repeated(pieces: Sequence[str]) -> bool:
    if len(set(pieces)) < 2:
        return False
    is_growing = all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    is_all_again = len(pieces) > 2 and pieces[-1] == "".join(pieces[:-1])
    return is_growing or is_all_again or (len(pieces) >= 6 and pieces[::2] == pieces[1::2])


def _stream(random: Random, truth: Truth) -> Body:
    """A stream of server-sent events."""
    chunks = [
        {"id": "s", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
        for delta in _deltas(random, truth)
    ]
    last: dict[str, Any] = {"id": "s", "choices": [{"index": 0, "delta": {}, "finish_reason": truth.finish}]}
    if chunks and random.random() < 0.2:
        chunks[-1]["choices"][0]["finish_reason"] = truth.finish
    else:
        chunks.append(last)
    if random.random() < 0.7:
        chunks.append({"id": "s", "choices": [], "usage": _usage(random)})
    line_end = random.choice((b"\n", b"\n", b"\r\n", b"\r"))
    events = []
    for chunk in chunks:
        lines = []
        if random.random() < 0.1:
            lines.append(random.choice((b": keep-alive", b"id: 7", b"event: message", b"retry: 10", b":")))
        data = encode(random, chunk)
        prefix = random.choice((b"data: ", b"data:"))
        lines += [prefix + part for part in data.split(b"\n")]
        events.append(line_end.join(lines))
        if random.random() < 0.05:
            events.append(
                random.choice(
                    (b": ping", b"data: ping", b"data: {}", b"event: ping" + line_end + b"data: {}")
                )
            )
    if random.random() < 0.85:
        events.append(b"data: [DONE]")
    raw = (line_end * 2).join(events) + line_end * random.choice((0, 1, 2, 2, 2))
    return Body(raw, truth, chunks, is_stream=True)


def _json_line_stream(random: Random, truth: Truth) -> Body:
    """Ollama's stream: a JSON object a line, with the next piece of the message in each."""
    truth.tools, truth.reasoning = "", ""
    if truth.text is None:
        truth.outcome, truth.finish, truth.text = "ok", "stop", texts.answer(random)
    pieces = _cut(random, truth.text)
    rows: list[dict[str, Any]] = [{"message": {"role": "assistant", "content": piece}} for piece in pieces]
    rows.append({"message": {"content": ""}, "done": True, "done_reason": truth.finish})
    raw = b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows) + b"\n"
    # Pieces that begin with all the pieces before them can't be told from whole messages.
    return Body(raw, truth, rows, is_stream=True, has_snapshots=True)


_MAKERS: tuple[Callable[[Random, Truth], Body], ...] = (
    *(_plain, _plain, _plain, _stream, _stream, _stream),
    *(_legacy, _ollama, _gemini, _json_line_stream),
)

Headers = Mapping[str, str]

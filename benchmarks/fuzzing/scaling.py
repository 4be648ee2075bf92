"""Measure the CPU time of inputs at two lengths: four times as long may take about four times the time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from harvester.api.error_body import classify
from harvester.api.redaction import Redactor
from harvester.api.replies import completion
from harvester.errors import PromptError, TeacherError
from harvester.prompts import formats, reader
from harvester.teacher.limiter.rate_headers import parse_rate_headers

# Four times the length may take this many times as long; a quadratic parser takes 16 times.
MOST_RATIO = 9.0
# Shorter times say nothing.
LEAST_S = 0.02
KEY = "sk-abcdefghijklmnopqrstuvwxyz012345"


def _answer(content: object, **choice: object) -> bytes:
    message = {"content": content}
    return json.dumps(
        {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **choice}]}
    ).encode()


def _events(deltas: list[object]) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return (
        b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    )


def _call(number: int) -> dict[str, object]:
    return {"tool_calls": [{"index": 0, "function": {"name": "f" if not number else "", "arguments": "x"}}]}


_TOKEN = {"token": "a", "bytes": [97], "logprob": -1, "top_logprobs": []}

# Bodies by what is repeated in them n times.
BODIES: Mapping[str, Callable[[int], bytes]] = {
    "text": lambda n: _answer("a" * n),
    "think tags": lambda n: _answer("\n<think>a</think>" * (n // 16)),
    "opening think tags": lambda n: _answer("<think>" * (n // 7)),
    "closing think tags": lambda n: _answer("a</think>" * (n // 9)),
    "ticks before tags": lambda n: _answer("`<think>" * (n // 8)),
    "fences before tags": lambda n: _answer("```\n<think>\n" * (n // 12)),
    "parts": lambda n: _answer([{"type": "text", "text": "a"}] * (n // 30)),
    "events": lambda n: _events([{"content": "a"}] * (n // 60)),
    "events with reasoning": lambda n: _events([{"reasoning": "a"}] * (n // 60)),
    "events with tool calls": lambda n: _events([_call(number) for number in range(n // 90)]),
    "events of many choices": lambda n: (
        b"".join(
            b'data: {"choices":[{"index":%d,"delta":{"content":"a"}}]}\n\n' % number
            for number in range(n // 50)
        )
        + b"data: [DONE]\n\n"
    ),
    "events with half characters": lambda n: (
        b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\n' * (n // 50) + b"data: [DONE]\n\n"
    ),
    "comments": lambda n: b": a\n\n" * (n // 5) + _events([{"content": "a"}]),
    "data lines of one event": lambda n: b"data: 1\n" * (n // 8),
    "line ends": lambda n: b"data: {}" + b"\n" * n,
    "carriage returns": lambda n: b"data: {}" + b"\r" * n,
    "JSON lines": lambda n: b'{"message":{"content":"a"}}\n' * (n // 27),
    "JSON lines that grow": lambda n: b"".join(
        json.dumps({"message": {"content": "a" * number}}).encode() + b"\n"
        for number in range(int((2 * n) ** 0.5))
    ),
    "brackets": lambda n: b"[" * n,
    "objects": lambda n: b'{"data":' * (n // 8),
    "digits": lambda n: b'{"choices":' + b"9" * n + b"}",
    "escapes": lambda n: _answer("\ud800" * (n // 6)),
    "members": lambda n: json.dumps({f"k{number}": 1 for number in range(n // 10)}).encode(),
    "choices": lambda n: json.dumps({"choices": [{"message": {"content": "a"}}] * (n // 35)}).encode(),
    "log-probabilities": lambda n: _answer("a", logprobs={"content": [_TOKEN] * (n // 60)}),
    "errors": lambda n: json.dumps({"errors": [{"message": "a"}] * (n // 18)}).encode(),
    "page": lambda n: b"<html>" + b"<p>" * (n // 3),
    "spaces": lambda n: b" " * n,
    "parts of one letter of the key": lambda n: _answer([{"type": "text", "text": "s"}] * (n // 30)),
}
_PROMPTS: Mapping[str, Callable[[int], bytes]] = {
    "messages": lambda n: json.dumps({"messages": [{"role": "user", "content": "a"}] * (n // 35)}).encode(),
    "turns": lambda n: json.dumps({"conversations": [{"from": "human", "value": "a"}] * (n // 35)}).encode(),
    "columns": lambda n: json.dumps({f"k{number}": 1 for number in range(n // 10)}).encode(),
}


def superlinear(base: int = 100_000) -> list[str]:
    """Return a line for each input whose time grows faster than its length."""
    slow = []
    for name, make in BODIES.items():
        for use in (_parse, _mask, _refuse):
            slow += _compare(f"{name}, {use.__name__[1:]}", make, use, base)
    for name, make in _PROMPTS.items():
        slow += _compare(f"{name}, prompt line", make, _read_line, base)
    slow += _compare("headers", lambda n: b"1h" * (n // 2), _headers, base)
    return slow


def _compare(name: str, make: Callable[[int], bytes], use: Callable[[bytes], None], base: int) -> list[str]:
    short, long = make(base), make(4 * base)
    times = [(_seconds(use, short), _seconds(use, long)) for _ in range(2)]
    before, after = (min(each) for each in zip(*times, strict=True))
    if after < LEAST_S or after / max(before, 1e-6) <= MOST_RATIO:
        return []
    return [f"{name}: {before:.3f} s for {len(short):,} bytes, {after:.3f} s for {len(long):,}"]


def _seconds(use: Callable[[bytes], None], raw: bytes) -> float:
    began = time.thread_time()
    use(raw)
    return time.thread_time() - began


def _parse(raw: bytes) -> None:
    try:
        completion.parse(raw, 10)
    except TeacherError:
        return


def _mask(raw: bytes) -> None:
    Redactor(KEY).body(raw)


def _refuse(raw: bytes) -> None:
    classify(400, {}, raw)


def _read_line(raw: bytes) -> None:
    row = formats._json_row(raw, "a:1")
    try:
        if not isinstance(row, PromptError):
            reader.to_prompt(row, file="a", line=1)
    except PromptError:
        return


def _headers(raw: bytes) -> None:
    parse_rate_headers(
        {"x-ratelimit-limit-requests": raw.decode(), "x-ratelimit-reset-requests": raw.decode()}
    )

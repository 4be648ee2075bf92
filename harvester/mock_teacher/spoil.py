"""Apply faults to the content of a reply: completion object, bytes of the body, stream events. No I/O."""

from __future__ import annotations

import copy
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from harvester.mock_teacher.completions import Completion, event
from harvester.mock_teacher.wire import Headers, error_body

Options = Mapping[str, Any]
JSON_TYPE = (b"content-type", b"application/json")
STREAM_TYPE = (b"content-type", b"text/event-stream; charset=utf-8")
_HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in.</body></html>"
_FINISH = re.compile(rb'"finish_reason":"[^"]*"')
DEFAULT_DECODED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class SpoiledReply:
    """An HTTP reply. For a stream `events` is set and `body` is unused."""

    status: int
    headers: Headers
    body: bytes = b""
    events: tuple[bytes, ...] | None = None

    def whole_body(self) -> bytes:
        """Return all bytes of the body or of the stream."""
        return self.body if self.events is None else b"".join(self.events)


def _merge(target: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7396): objects merge, null removes, anything else replaces."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _on_choices(change: Callable[[dict[str, Any]], None]) -> Callable[[Completion], None]:
    def apply(document: Completion) -> None:
        for choice in document["choices"]:
            change(choice)

    return apply


def _tool_call(options: Options) -> Callable[[Completion], None]:
    call = {
        "id": "call_mock",
        "type": "function",
        "function": {"name": options.get("function", "look_up"), "arguments": options.get("arguments", "{}")},
    }

    def change(choice: dict[str, Any]) -> None:
        choice["message"].update(content=None, tool_calls=[call])
        choice["finish_reason"] = "tool_calls"

    return _on_choices(change)


def _halve(choice: dict[str, Any]) -> None:
    text = choice["message"]["content"]
    choice["message"]["content"] = text[: len(text) // 2]
    choice["finish_reason"] = "length"


def _extra_choice(document: Completion) -> None:
    document["choices"].append({**copy.deepcopy(document["choices"][-1]), "index": len(document["choices"])})


def _shuffled_choices(document: Completion) -> None:
    """Put the choices into an order that differs from that of their indices, the same in every run."""
    choices = document["choices"]
    document["choices"] = choices[1::2] + choices[::2][::-1]


def _parts(options: Options) -> Callable[[Completion], None]:
    def change(choice: dict[str, Any]) -> None:
        text = choice["message"]["content"]
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": piece} for piece in (text[:1], text[1:]) if piece
        ]
        if "reasoning" in options:
            thought = [{"type": "text", "text": options["reasoning"]}]
            parts.insert(0, {"type": "thinking", "thinking": thought})
        choice["message"]["content"] = parts

    return _on_choices(change)


def _think(options: Options) -> Callable[[Completion], None]:
    form = options.get("form", "whole")
    opening = "" if form == "closing" else "<think>"
    thought = opening + options.get("value", "Let me add.")

    def change(choice: dict[str, Any]) -> None:
        text = choice["message"]["content"]
        choice["message"]["content"] = thought if form == "opening" else f"{thought}</think>\n\n{text}"

    return _on_choices(change)


def _no_message(options: Options) -> Callable[[Completion], None]:
    def change(choice: dict[str, Any]) -> None:
        del choice["message"]
        choice["finish_reason"] = options.get("value", "content_filter")

    return _on_choices(change)


def _error_beside(options: Options) -> Callable[[Completion], None]:
    error = {"code": options.get("code", 502), "message": options.get("message", "Scripted fault.")}
    place = options.get("place", "top")

    def change(document: Completion) -> None:
        for choice in document["choices"]:
            choice["message"]["content"] = ""
            choice["finish_reason"] = None
            if place != "top":
                (choice if place == "choice" else choice["message"])["error"] = error
        if place == "top":
            document["error"] = error

    return change


def _base_resp(options: Options) -> Callable[[Completion], None]:
    envelope = {
        "status_code": options.get("code", 1008),
        "status_msg": options.get("message", "insufficient balance"),
    }
    return lambda document: document.update(choices=None, base_resp=envelope)


def _envelope(options: Options) -> Callable[[Completion], None]:
    def change(document: Completion) -> None:
        inner = dict(document)
        document.clear()
        document.update({"code": 0, "message": "success", options.get("value", "data"): inner})

    return change


def _null_logprobs(choice: dict[str, Any]) -> None:
    for entry in (choice.get("logprobs") or {}).get("content") or ():
        entry["logprob"] = None


def _legacy_logprobs(choice: dict[str, Any]) -> None:
    entries = (choice.get("logprobs") or {}).get("content") or ()
    choice["logprobs"] = {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [None, *(entry["logprob"] for entry in entries[1:])],
        "top_logprobs": [
            {other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in entries
        ],
    }


def _message(field: str, value: Any) -> Callable[[Completion], None]:
    return _on_choices(lambda choice: choice["message"].update({field: value}))


_ANSWERS: dict[str, Callable[[Options], Callable[[Completion], None]]] = {
    "choice": lambda o: _on_choices(lambda choice: choice.update(_merge(choice, o["value"]))),
    "message": lambda o: _on_choices(lambda choice: choice["message"].update(o["value"])),
    "content": lambda o: _message("content", o["value"]),
    "null_content": lambda _: _message("content", None),
    "empty_content": lambda _: _message("content", ""),
    "refusal": lambda o: _on_choices(
        lambda choice: choice["message"].update(
            content=None, refusal=o.get("value", "I can't help with that.")
        )
    ),
    "reasoning": lambda o: _message("reasoning_content", o.get("value", "Let me think.")),
    "tool_call": _tool_call,
    "length": lambda _: _on_choices(_halve),
    "content_filter": lambda _: _on_choices(lambda choice: choice.update(finish_reason="content_filter")),
    "finish_reason": lambda o: _on_choices(lambda choice: choice.update(finish_reason=o.get("value"))),
    "usage": lambda o: lambda document: document.update(usage=o.get("value")),
    "no_usage": lambda _: lambda document: document.__delitem__("usage"),
    "id": lambda o: lambda document: document.update(id=o.get("value", "chatcmpl-duplicate")),
    "no_id": lambda _: lambda document: document.__delitem__("id"),
    "model": lambda o: lambda document: document.update(model=o.get("value", "another-model")),
    "fingerprint": lambda o: (
        lambda document: document.update(system_fingerprint=o.get("value", "mock-changed"))
    ),
    "empty_choices": lambda _: lambda document: document.update(choices=[]),
    "null_choices": lambda _: lambda document: document.update(choices=None),
    "no_choices": lambda _: lambda document: document.__delitem__("choices"),
    "extra_choice": lambda _: _extra_choice,
    "reversed_choices": lambda _: lambda document: document["choices"].reverse(),
    "shuffled_choices": lambda _: _shuffled_choices,
    "repeated_choice": lambda _: (
        lambda document: document["choices"][-1].update(index=document["choices"][0]["index"])
    ),
    "parts": _parts,
    "think": _think,
    "blank_content": lambda o: _message("content", o.get("value", "\n\n")),
    "no_message": _no_message,
    "error_beside": _error_beside,
    "base_resp": _base_resp,
    "envelope": _envelope,
    "null_logprobs": lambda _: _on_choices(_null_logprobs),
    "legacy_logprobs": lambda _: _on_choices(_legacy_logprobs),
    "wrong_index": lambda _: _on_choices(lambda choice: choice.update(index=choice["index"] + 7)),
}


def spoil_answer(action: str, options: Options, document: Completion) -> Completion:
    """Apply an action of stage `answer`; may change the given object."""
    if action == "patch":
        merged: Completion = _merge(document, options["value"])
        return merged
    if action in _ANSWERS:  # `delay` changes nothing
        at = options.get("at")
        part = document if at is None else {**document, "choices": document["choices"][at : at + 1]}
        _ANSWERS[action](options)(part)
    return document


def _in_content(escaped: bytes) -> Callable[[Options, bytes], bytes]:
    """Insert raw bytes at the start of the answer's text, or of the first string in the body."""
    return lambda _, body: body.replace(b'"content":"', b'"content":"' + escaped)


def _deep(options: Options, body: bytes) -> bytes:
    depth = int(options.get("depth", 100_000))
    return body[:-1] + b',"deep":' + b"[" * depth + b"]" * depth + b"}"


_BODIES: dict[str, Callable[[Options, bytes], bytes]] = {
    "junk_json": lambda _, body: b"{not json at all",
    "truncated_json": lambda o, body: body[: int(len(body) * o.get("share", 0.5))],
    "invalid_utf8": _in_content(b"\xff\xfe\xc3("),
    "bom": lambda _, body: b"\xef\xbb\xbf" + body,
    "nan": lambda _, body: body[:-1] + b',"score":NaN}',
    "duplicate_keys": lambda _, body: body[:-1] + b',"id":"chatcmpl-second"}',
    "deep_json": _deep,
    "big_integer": lambda o, body: body[:-1] + b',"big":' + b"9" * o.get("digits", 5000) + b"}",
    "lone_surrogate": _in_content(b"\\ud800"),
    "nul": _in_content(b"\\u0000"),
    "empty_body": lambda _, body: b"",
}


def _with_headers(headers: Headers, changed: Mapping[str, Any]) -> Headers:
    """Replace headers by name; a null value removes one."""
    new = {name.lower().encode("latin-1"): value for name, value in changed.items()}
    kept = [(name, value) for name, value in headers if name not in new]
    return kept + [(name, str(value).encode("latin-1")) for name, value in new.items() if value is not None]


def as_bytes(value: Any) -> bytes:
    """Return a script's body: text as UTF-8, anything else as JSON."""
    return value.encode() if isinstance(value, str) else json.dumps(value).encode()


def spoil_body(action: str, options: Options, reply: SpoiledReply) -> SpoiledReply:
    """Apply an action of stage `body`. A stream whose text is changed becomes one block of bytes."""
    if action == "headers":
        return replace(reply, headers=_with_headers(reply.headers, options["value"]))
    if action == "content_type":
        headers = _with_headers(reply.headers, {"content-type": options.get("value", "text/plain")})
        return replace(reply, headers=headers)
    if action == "body":
        headers = _with_headers(
            reply.headers, {"content-type": options.get("content_type", "application/json")}
        )
        return SpoiledReply(reply.status, headers, as_bytes(options["value"]))
    if action == "answer_status":
        return replace(reply, status=options.get("status", 201))
    if action == "around":
        prefix, suffix = (str(options.get(name, "")).encode() for name in ("prefix", "suffix"))
        return SpoiledReply(reply.status, reply.headers, prefix + reply.whole_body() + suffix)
    if action == "long_header":
        headers = _with_headers(reply.headers, {"x-filler": "a" * options.get("bytes", 9000)})
        return replace(reply, headers=headers)
    if action == "gzip_bomb":
        headers = _with_headers(reply.headers, {"content-encoding": "gzip"})
        return SpoiledReply(
            reply.status, headers, gzip_bomb(options.get("decoded_bytes", DEFAULT_DECODED_BYTES))
        )
    return SpoiledReply(reply.status, reply.headers, _BODIES[action](options, reply.whole_body()))


@lru_cache(maxsize=4)
def gzip_bomb(decoded_bytes: int) -> bytes:
    """Return a valid gzip file of JSON whose text is `decoded_bytes` spaces, rounded to MiB."""
    head, block, tail = b'{"choices":[{"message":{"content":"', b" " * 2**20, b'"}}]}'
    blocks = max(1, decoded_bytes >> 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(head)]
    parts += [packer.compress(block) for _ in range(blocks)]
    parts.append(packer.compress(tail) + packer.flush())
    return b"".join(parts)


def spoil_stream(action: str, options: Options, reply: SpoiledReply) -> SpoiledReply:
    """Apply an action of stage `stream` to the events."""
    events = reply.events or ()
    kept = events[: options.get("events", max(1, len(events) // 2))]
    if action == "no_done":
        events = events[:-1]
    elif action == "stream_cut":
        events = kept
    elif action == "stream_error":
        error = {
            "message": options.get("message", "The server had an error."),
            "code": options.get("code", 500),
        }
        events = (*kept, event({"error": error}))
    elif action == "stream_no_finish":
        events = tuple(_FINISH.sub(b'"finish_reason":null', line) for line in events)
    elif action == "stream_split_emoji":
        halves = tuple(_half_event(half) for half in ("\\ud83d", "\\ude00"))
        events = (*events[:1], *halves, *events[1:])
    elif action == "stream_no_blank_lines":
        events = tuple(line.removesuffix(b"\n") for line in events)
    elif action == "stream_so_far":
        events = _so_far(events)
    elif action == "stream_twice":
        events = tuple(line for line in events for _ in range(2))
    elif action == "stream_junk":
        events = (*kept, b"data: {not json\n\n", *events[len(kept) :])
    else:  # stream_comments: keep-alives between all events
        events = tuple(part for line in events for part in (b": keep-alive\n\n", line))
    return replace(reply, events=events)


def _so_far(events: Sequence[bytes]) -> tuple[bytes, ...]:
    """The events with all text so far in each delta that has content."""
    text: dict[int, str] = {}
    changed = []
    for line in events:
        chunk = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: {") else {}
        for choice in chunk.get("choices", ()):
            if piece := choice["delta"].get("content"):
                text[choice["index"]] = text.get(choice["index"], "") + piece
                choice["delta"]["content"] = text[choice["index"]]
        changed.append(event(chunk) if chunk else line)
    return tuple(changed)


def _half_event(half: str) -> bytes:
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % half.encode()


def refuse(action: str, options: Options) -> SpoiledReply:
    """Return the reply of an action of stage `refuse`."""
    if action == "redirect":
        location = str(options.get("location", "http://127.0.0.1:9/elsewhere")).encode()
        return SpoiledReply(options.get("status", 307), [(b"location", location)])
    if action == "html":
        return SpoiledReply(
            options.get("status", 200), [(b"content-type", b"text/html; charset=utf-8")], _HTML
        )
    status = 200 if action == "error_200" else options.get("status", 500)
    code, kind = options.get("code"), options.get("kind", "mock_error")
    body = error_body(options.get("message", f"Scripted fault ({status})."), kind, code)
    if "body" in options:
        body = as_bytes(options["body"])
    headers = _with_headers([JSON_TYPE], options.get("headers", {}))
    if "content_type" in options:
        headers = _with_headers(headers, {"content-type": options["content_type"]})
    if "retry_after" in options:
        headers = _with_headers(headers, {"retry-after": options["retry_after"]})
    return SpoiledReply(status, headers, body)

"""Hide an API key in a body, in the spellings of servers and attackers; look for it in what is kept."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from random import Random
from typing import Any
from urllib.parse import quote

_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def make_key(random: Random) -> str:
    """Return a key as providers make them."""
    body = "".join(random.choices(_ALPHABET, k=random.randint(20, 44)))
    return random.choice(("sk-", "sk-proj-", "gsk_", "", "xai-", "key/", "a+b=")) + body


def _escaped(random: Random, text: str) -> str:
    """Return a JSON string of a text with some characters as \\u escapes."""
    return (
        '"'
        + "".join(f"\\u{ord(c):04x}" if random.random() < 0.6 else json.dumps(c)[1:-1] for c in text)
        + '"'
    )


def _spelled(random: Random, key: str) -> str:
    """Return the key as one string, in one of its encodings."""
    way = random.randrange(7)
    if way == 0:
        return base64.b64encode(("x" * random.randrange(3) + key).encode()).decode()
    if way == 1:
        return base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    if way == 2:
        return key.encode().hex()
    if way == 3:
        return quote(key, safe="")
    return f"Bearer {key}" if way == 4 else key


def _put(random: Random, key: str, choice: dict[str, Any], document: dict[str, Any]) -> None:
    """Put the key into an answer, somewhere."""
    shown, message = _spelled(random, key), choice["message"]
    letters = [{"type": "text", "text": letter} for letter in key]
    hidden = {"token": "?", "bytes": list(key.encode()), "logprob": -1.0}
    tokens = [{"token": c, "bytes": list(c.encode()), "logprob": -0.5, "top_logprobs": []} for c in key]
    alternatives = [{"token": "?", "logprob": -1.0, "top_logprobs": [token]} for token in tokens]
    function = {"name": "f", "arguments": json.dumps({"k": shown})}
    place = random.randrange(14)
    if place < 2:
        message["content"] = f"α {shown} β" if place else letters
    elif place < 5:
        found: Any = (tokens, [{**hidden, "top_logprobs": [hidden]}], alternatives)[place - 2]
        choice["logprobs"] = {"content": found}
    elif place < 7:
        message |= ({"reasoning_content": shown}, {"refusal": shown})[place - 5]
    elif place == 7:
        message |= {"content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]}
        choice["finish_reason"] = "tool_calls"
    elif place == 8:
        document["error"] = {"message": f"Incorrect API key provided: {shown}", "code": shown}
    elif place == 9:
        document |= {"model": shown, "id": shown, "system_fingerprint": shown}
    elif place == 10:
        choice["finish_reason"] = shown
    elif place == 11:
        message |= {"content": key[:9], "reasoning": [{"type": "reasoning.text", "text": c} for c in key]}
    elif place == 12:
        message["content"] = [key[:5], *letters[5:9], {"type": "output_text", "text": key[9:]}]
    else:
        message["content"] = f"<think>{shown}</think>α"


def _streamed(random: Random, key: str) -> bytes:
    pieces = list(key) if random.random() < 0.5 else [key[:7], key[7:]]
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if random.random() < 0.2:
        chunks.pop()
    events = [b"data: " + _encode(random, chunk, key) + b"\n\n" for chunk in chunks]
    return b"".join(events) + random.choice((b"data: [DONE]\n\n", b""))


# Members that make a body one that only a tolerant parser reads, or none.
_SPOILS = (b'"x":NaN', b'"x":1e999', b'"x":"\xff"', b'"x":"\\ud800"', b'"x":' + b"9" * 400, b'"x":"')


def body_with_key(random: Random, key: str) -> bytes:
    """Return a body of a 200 that holds the key."""
    if random.random() < 0.15:
        return _streamed(random, key)
    choice: dict[str, Any] = {"index": 0, "message": {"content": "α"}, "finish_reason": "stop"}
    document: dict[str, Any] = {"id": "i", "model": "m", "choices": [choice]}
    _put(random, key, choice, document)
    raw = _encode(random, document, key)
    return raw[:-1] + b"," + random.choice(_SPOILS) + b"}" if random.random() < 0.4 else raw


def _encode(random: Random, document: Any, key: str) -> bytes:
    text = json.dumps(document)
    if random.random() < 0.5:
        text = text.replace(json.dumps(key), _escaped(random, key))
    if random.random() < 0.2:
        text = text.replace("/", "\\/")
    return text.encode()


def holds(text: str, key: str) -> bool:
    """Return whether a text spells the key: plain, in hexadecimal or in base64."""
    if key in text or key.encode().hex() in text.lower():
        return True
    return any(form in text for form in _base64_forms(key))


def _base64_forms(key: str) -> Iterator[str]:
    for phase in range(3):
        coded = base64.b64encode(b"\0" * phase + key.encode()).decode()
        inner = coded[4 * (phase > 0) : -4]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")


def flat(value: Any) -> str:
    """Return all texts of a value, one after the other with nothing between; bytes are decoded."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | tuple):
        return "".join(map(flat, value))
    if hasattr(value, "__dataclass_fields__"):
        return "".join(flat(getattr(value, name)) for name in value.__dataclass_fields__)
    return ""


def spellings_in(raw: bytes, key: str) -> list[str]:
    """Return how the bytes spell the key, plainly or as JSON strings that follow each other."""
    found = []
    text = raw.decode("utf-8", "replace")
    if holds(text, key):
        found.append("plain")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return found
    if any(holds(each, key) for each in _strings(document)):
        found.append("a string")
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _strings(item)

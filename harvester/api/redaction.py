"""Remove the credential from replies, before anything is parsed, logged or stored. Pure.

A misconfigured proxy or a hostile endpoint can send the key back: in a body or a header, encoded in some way,
or cut into pieces that the parser joins: events of a stream, parts of one letter, bytes of log-probabilities.
Nothing that is stored, or that is read from what is stored, may contain it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import orjson

from harvester.api.replies.completion import load, parse
from harvester.api.replies.sse import is_stream
from harvester.api.types import Alternative, Completion, TokenLogprob
from harvester.errors import TeacherError

REDACTED = b"***"
# A shorter key is a placeholder such as EMPTY, for servers that need none; masking it would damage answers.
SHORTEST = 12
# Stands for a body that spells the key in a way that can't be taken out of it.
_NOTHING_LEFT = b'{"choices":[{"index":0,"message":{"content":"***"},"finish_reason":null}]}'
_ESCAPE = re.compile(rb"\\+u([0-9a-fA-F]{4})")

# An escape that a key may be written with: keys are ASCII.
_ASCII_ESCAPE = re.compile(rb"\\u00[2-7]|\\/")


class Redactor:
    """Replaces one secret, and its base64, percent-encoded, hexadecimal and JSON spellings, by `***`."""

    def __init__(self, secret: str | None) -> None:
        self._forms = _forms(secret) if secret and len(secret) >= SHORTEST else ()
        self._texts = tuple(form.decode() for form in self._forms)
        self._numbers = tuple(tuple(b"%d" % byte for byte in form) for form in self._forms)

    @property
    def secret(self) -> str:
        """The secret, to make another redactor in a child process; "" for none."""
        return self._texts[0] if self._texts else ""

    @property
    def is_active(self) -> bool:
        """Whether there is a secret to look for."""
        return bool(self._forms)

    def __repr__(self) -> str:
        return "Redactor(***)"

    def body(self, body: bytes) -> bytes:
        """Return a reply's body without the secret; unchanged bytes where it was not in them."""
        if not self._forms:
            return body
        plain = self.text(body)
        if b"\\" not in plain and not is_stream(plain) and not self._may_spell(plain):
            return plain
        try:
            document, _ = load(plain)
            text = _dumps(document)  # without \/ and \u escapes, streams in one piece
        except Exception:  # noqa: BLE001 - the parser will report what is wrong with it
            return self._unescaped(plain)
        if _ASCII_ESCAPE.search(plain) is not None and self._unescaped(plain) != plain:
            plain = text  # it lies in the document, or beside it, as in a member that a later one replaces
        masked = self.text(text)
        if b"\\u" not in masked and not self._may_spell(masked):
            return plain if masked == text else masked
        tree = orjson.loads(masked)
        if self._mask_tree(tree):
            masked = _dumps(tree)
        if self._is_spelled(masked):
            return _NOTHING_LEFT
        return plain if masked == text else masked

    def text(self, text: bytes) -> bytes:
        """Return bytes without any plain spelling of the secret."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, REDACTED)
        return text

    def string(self, text: str) -> str:
        """Return a string without the secret."""
        return self.text(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return headers without the secret in their values."""
        return {name: self.string(value) for name, value in headers.items()}

    def _may_spell(self, text: bytes) -> bool:
        """Whether the letters of a form occur in this order, whatever lies between them, or as numbers do."""
        if any(_in_order(form, text) for form in self._forms):
            return True
        return b'"bytes"' in text and any(_in_order(numbers, text) for numbers in self._numbers)

    def _unescaped(self, text: bytes) -> bytes:
        r"""Text that is no JSON, with its `\u` escapes resolved if they spell the secret."""
        if b"\\" not in text:
            return text
        resolved = _resolve(text).replace(b"\\/", b"/")
        masked = self.text(resolved)
        return text if masked == resolved else masked

    def _mask_tree(self, tree: Any) -> bool:
        """Mask what the texts and byte lists of equal places spell together; returns whether any did."""
        is_changed = False
        for group in _leaves_by_place(tree).values():
            if isinstance(group[0][2], str):
                is_changed = self._mask_texts(group) or is_changed
            else:
                is_changed = self._mask_numbers(group) or is_changed
        return is_changed

    def _mask_texts(self, group: Sequence[tuple[Any, Any, str]]) -> bool:
        is_changed = False
        for holder, key, text in group:
            if "\\" in text and (resolved := self._unescaped(text.encode("utf-8", "surrogatepass"))):
                shorter = resolved.decode("utf-8", "replace")
                if shorter != text:
                    holder[key], is_changed = shorter, True
        texts = [holder[key] for holder, key, _ in group]
        hidden = _covered("".join(texts), self._texts)
        at = 0
        for (holder, key, _), text in zip(group, texts, strict=True):
            if hidden and any(number in hidden for number in range(at, at + len(text))):
                kept = "".join(char for number, char in enumerate(text, at) if number not in hidden)
                holder[key], is_changed = kept + REDACTED.decode(), True
            at += len(text)
        return is_changed

    def _mask_numbers(self, group: Sequence[tuple[Any, Any, list[int]]]) -> bool:
        hidden = _covered(b"".join(bytes(numbers) for *_, numbers in group).decode("latin-1"), self._texts)
        at = 0
        for holder, key, numbers in group:
            holder[key] = [42 if at + i in hidden else number for i, number in enumerate(numbers)]
            at += len(numbers)
        return bool(hidden)

    def _is_spelled(self, raw: bytes) -> bool:
        """Whether the parser still reads the secret out of a body."""
        try:
            texts = list(_texts_of(parse(raw)))
        except TeacherError as error:
            texts = [error.message, error.error_code]
        return any(form in text for text in texts for form in self._texts)


def _covered(text: str, forms: Sequence[str]) -> set[int]:
    """The positions in a text that belong to one of the forms."""
    covered: set[int] = set()
    for form in forms:
        at = text.find(form)
        while at >= 0:
            covered.update(range(at, at + len(form)))
            at = text.find(form, at + len(form))
    return covered


def _in_order(form: bytes | Sequence[bytes], text: bytes) -> bool:
    """Whether the elements of a form occur in a text one after the other."""
    at = 0
    for element in form:
        at = text.find(element, at) + 1  # an int, of bytes, is found as one byte
        if not at:
            return False
    return True


def _resolve(text: bytes) -> bytes:
    r"""Text with its `\u` escapes as characters, also those that are escaped twice."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)).encode("utf-8", "surrogatepass"), text)


def _dumps(document: Any) -> bytes:
    try:
        return orjson.dumps(document)
    except (TypeError, ValueError):  # an integer beyond 64 bits
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def _leaves_by_place(tree: Any) -> dict[tuple[str, ...], list[tuple[Any, Any, Any]]]:
    """Texts and lists of byte values with their holder and key, in order, by the names on the way to them."""
    places: dict[tuple[str, ...], list[tuple[Any, Any, Any]]] = {}
    waiting: list[tuple[Any, tuple[str, ...]]] = [(tree, ())]
    while waiting:
        value, place = waiting.pop()
        further: list[tuple[Any, tuple[str, ...]]] = []
        members: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        for key, member in members:
            at = (*place, key) if isinstance(value, dict) else place
            if isinstance(member, str):
                places.setdefault((*at, "text"), []).append((value, key, member))
            elif isinstance(member, list) and member and all(_is_byte(item) for item in member):
                places.setdefault((*at, "bytes"), []).append((value, key, member))
            elif isinstance(member, dict | list):
                further.append((member, at))
        waiting += reversed(further)
    return places


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value < 256


def _texts_of(answer: Completion) -> Iterator[str]:
    """Every text that is stored of an answer, or that can be read from it."""
    for name in ("text", "reasoning", "refusal", "tool_calls_json", "model", "response_id", "finish_reason"):
        yield getattr(answer, name) or ""
    yield answer.system_fingerprint
    yield answer.provider
    ranks: dict[int, list[Alternative]] = {}
    for token in answer.logprobs:
        for rank, alternative in enumerate(token.top):
            ranks.setdefault(rank, []).append(alternative)
    sequences: list[Sequence[TokenLogprob | Alternative]] = [answer.logprobs, *ranks.values()]
    for tokens in sequences:
        yield "".join(token.token for token in tokens)
        yield b"".join(token.data or b"" for token in tokens).decode("latin-1")


def _forms(secret: str) -> tuple[bytes, ...]:
    """The spellings to look for: plain, base64, hexadecimal, percent-encoded, with and without `sk-`."""
    raw = secret.encode()
    bare = raw.split(b"-", 1)[-1] if raw.startswith(b"sk-") else raw
    forms: dict[bytes, None] = {raw: None}
    for text in (raw, bare) if len(bare) >= SHORTEST else (raw,):
        forms[text] = None
        for phase in range(3):  # base64 where the secret starts at byte 0, 1 or 2 of a group
            coded = base64.b64encode(b"\0" * phase + text)[4 * (phase > 0) : -4]
            forms[coded] = None
            forms[coded.replace(b"+", b"-").replace(b"/", b"_")] = None
        forms[text.hex().encode()] = None
    for safe in ("", "/"):
        forms[quote(secret, safe=safe).encode()] = None
        forms[quote(secret, safe=safe).lower().encode()] = None
    return tuple(form for form in forms if form)

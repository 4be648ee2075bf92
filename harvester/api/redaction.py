"""The credential, wherever a reply echoes it: masked before anything is parsed, logged or stored. Pure.

A careless proxy or a hostile endpoint can send the key back, as it is or in another dress, in a body, a
header or spread over the events of a stream; what is kept for good must not hold it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from urllib.parse import quote

import orjson

from harvester.api.sse import assemble, is_stream

REDACTED = b"***"
SHORTEST = 12
"""A shorter key is a word such as EMPTY, for servers that ask for none: masking it would garble answers."""


class Redactor:
    """Replaces one secret, and its base64, percent-encoded, hexadecimal and JSON spellings, by `***`."""

    def __init__(self, secret: str | None) -> None:
        self._forms = _forms(secret) if secret and len(secret) >= SHORTEST else ()

    def __repr__(self) -> str:
        return "Mask(***)"

    def body(self, body: bytes) -> bytes:
        """A reply's body without the secret; the very same bytes where it was not in them."""
        if not self._forms:
            return body
        if is_stream(body):
            return self._stream(body)
        plain = self.text(body)
        if b"\\" not in plain:
            return plain
        try:
            respelt = orjson.dumps(orjson.loads(plain))  # undoes \/ and \u escapes
        except (ValueError, TypeError, RecursionError):
            return plain
        masked = self.text(respelt)
        return plain if masked == respelt else masked

    def text(self, text: bytes) -> bytes:
        """Bytes without any plain spelling of the secret."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, REDACTED)
        return text

    def words(self, text: str) -> str:
        """A sentence, likewise."""
        return self.text(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers, likewise."""
        return {name: self.words(value) for name, value in headers.items()}

    def _stream(self, body: bytes) -> bytes:
        plain = self.text(body)
        try:
            whole = orjson.dumps(assemble(plain))
        except Exception:  # noqa: BLE001 - what is no stream is told by whoever parses it
            return plain
        masked = self.text(whole)
        return plain if masked == whole else masked


def _forms(secret: str) -> tuple[bytes, ...]:
    raw = secret.encode()
    bare = raw.split(b"-", 1)[-1] if raw.startswith(b"sk-") else raw
    found: dict[bytes, None] = {raw: None}
    for text in (raw, bare) if len(bare) >= SHORTEST else (raw,):
        found[text] = None
        for phase in range(3):  # base64 of a text that begins anywhere in a group of three; its core
            coded = base64.b64encode(b"\0" * phase + text)[4 * (phase > 0) : -4]
            found[coded] = None
            found[coded.replace(b"+", b"-").replace(b"/", b"_")] = None
        found[text.hex().encode()] = None
    for safe in ("", "/"):
        found[quote(secret, safe=safe).encode()] = None
        found[quote(secret, safe=safe).lower().encode()] = None
    return tuple(form for form in found if form)

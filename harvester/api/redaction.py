"""Remove the credential from replies, before anything is parsed, logged or stored. Pure.

A misconfigured proxy or a hostile endpoint can send the key back: in a body or a header, encoded in some way,
or spread over the events of a stream. Nothing that is stored may contain it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from urllib.parse import quote

import orjson

from harvester.api.completion import load
from harvester.api.sse import is_stream

REDACTED = b"***"
# A shorter key is a placeholder such as EMPTY, for servers that need none; masking it would damage answers.
SHORTEST = 12


class Redactor:
    """Replaces one secret, and its base64, percent-encoded, hexadecimal and JSON spellings, by `***`."""

    def __init__(self, secret: str | None) -> None:
        self._forms = _forms(secret) if secret and len(secret) >= SHORTEST else ()

    def __repr__(self) -> str:
        return "Redactor(***)"

    def body(self, body: bytes) -> bytes:
        """A reply's body without the secret; unchanged bytes where it was not in them."""
        if not self._forms:
            return body
        plain = self.text(body)
        if b"\\" not in plain and not is_stream(plain):
            return plain
        try:
            document, _ = load(plain)
            whole = orjson.dumps(document)  # without \/ and \u escapes, streams in one piece
        except Exception:  # noqa: BLE001 - the parser will report what is wrong with it
            return plain
        masked = self.text(whole)
        return plain if masked == whole else masked

    def text(self, text: bytes) -> bytes:
        """Bytes without any plain spelling of the secret."""
        for form in self._forms:
            if form in text:
                text = text.replace(form, REDACTED)
        return text

    def string(self, text: str) -> str:
        """A string without the secret."""
        return self.text(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")

    def headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers without the secret in their values."""
        return {name: self.string(value) for name, value in headers.items()}


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

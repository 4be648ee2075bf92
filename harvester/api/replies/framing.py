"""Find the JSON of a body among what servers and gateways put around it. Pure.

Keep-alives may precede it, an end mark or padding may follow, and a gateway may send the JSON as text inside
JSON. The answer was paid for, so none of this loses it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from harvester.api.replies.sse import integer_of

# Comments of an event stream, and blank lines. One with quotes or braces may be the rest of a JSON line.
# Possessive here and below: there are millions of them in some bodies, and `\r\n` can be one end or two.
_COMMENTS = re.compile(rb"(?:[ \t]*+(?::[^\r\n\"{}]*+)?+[\r\n]++)++(?=[ \t]*+\{)")
# A record separator of JSON text sequences, and guards against inclusion as a script.
_GUARDS = (b"\x1e", b")]}',", b")]}'")
# What may follow a whole document without a meaning, besides white space.
_END = re.compile(r"(?:[\s\0\x1e\ufeff]++|data:|\[DONE\])*+\Z")
_SPACE = re.compile(r"\s*+")
# Members of the envelope of a cloud function that hold a body as text.
_TEXT_BODIES = ("body", "Body")


def unframed(raw: bytes) -> bytes:
    """Return a body without what may precede its JSON: a byte order mark, keep-alives, a guard.

    Events that follow comments are no JSON: such a body is returned as it is.
    """
    text = raw.removeprefix(b"\xef\xbb\xbf")
    if text[:1] == b"{":  # nearly all bodies
        return text
    for guard in _GUARDS:
        text = text.removeprefix(guard)
    comments = _COMMENTS.match(text)
    return text[comments.end() :] if comments else text


def unwrapped(document: Any) -> Any:
    """Return a document that came as a text inside JSON, or as the text of a member `body`."""
    if isinstance(document, str):
        document = _loaded(document, document)
    if isinstance(document, dict) and "choices" not in document:
        for name in _TEXT_BODIES:
            body = document.get(name)
            if isinstance(body, str) and body.lstrip()[:1] == "{":
                return {**document, name: _loaded(body, body)}
    return document


def _loaded(text: str, otherwise: Any) -> Any:
    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, RecursionError):
        return otherwise


def read_documents(text: str) -> tuple[list[Any], bool, str]:
    """Read the JSON documents at the start of a text, and return what follows them.

    What can't be kept (half a character, NaN) is replaced.

    Returns:
        The documents, whether all of the text was read without loss, and the rest of it.

    Raises:
        ValueError: it begins with none.
        RecursionError: nested too deep.
    """
    decoder = json.JSONDecoder(parse_int=integer_of)
    documents: list[Any] = []
    is_exact, at = True, _space_end(text, 0)
    while not documents or not _END.match(text, at):
        start = at
        try:
            document, at = decoder.raw_decode(text, start)
        except ValueError:
            if documents:
                return documents, False, text[start:]
            raise
        try:
            documents.append(orjson.loads(text[start:at]))
        except (orjson.JSONDecodeError, UnicodeError):
            is_exact = False
            kept = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            documents.append(json.loads(kept))
        at = _space_end(text, at)
    return documents, is_exact, ""


def _space_end(text: str, start: int) -> int:
    """Where white space from a place on ends."""
    space = _SPACE.match(text, start)
    return space.end() if space else start

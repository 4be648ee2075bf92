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

# Comments of an event stream, and blank lines.
_COMMENTS = re.compile(rb"(?:[ \t]*(?::[^\r\n]*)?(?:\r\n|\r|\n))+(?=[ \t]*\{)")
# A record separator of JSON text sequences, and guards against inclusion as a script.
_GUARDS = (b"\x1e", b")]}',", b")]}'")
# What may follow a whole document without a meaning, besides white space.
_END = re.compile(r"(?:\s|\0|\x1e|\ufeff|data:|\[DONE\])*\Z")
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


def read_documents(text: str) -> tuple[list[Any], bool]:
    """Read the JSON documents at the start of a text, and whether all of it was read without loss.

    What can't be kept (half a character, NaN) is replaced, and what follows the documents left out.

    Raises:
        ValueError: it begins with none.
        RecursionError: nested too deep.
    """
    decoder = json.JSONDecoder(parse_int=integer_of)
    documents: list[Any] = []
    is_exact, at = True, len(text) - len(text.lstrip())
    while not documents or not _END.match(text, at):
        start = at
        try:
            document, at = decoder.raw_decode(text, start)
        except ValueError:
            if documents:
                return documents, False
            raise
        try:
            documents.append(orjson.loads(text[start:at]))
        except (orjson.JSONDecodeError, UnicodeError):
            is_exact = False
            kept = json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")
            documents.append(json.loads(kept))
        while text[at : at + 1].isspace():
            at += 1
    return documents, is_exact

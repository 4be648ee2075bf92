"""Who signed an answer: the model and the provider its body names, found without parsing the rest. Pure.

The doors ask it of every journalled answer at every start, and an answer with log-probabilities is a megabyte
of which these two are a hundred bytes.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from harvester.api import completion
from harvester.api.sse import DONE, events, is_stream
from harvester.errors import TeacherError

# A quote inside a JSON string is escaped, so these bytes are a key wherever they stand, but for a key that
# ends in them. They begin with what is looked for: a look behind would make the search thirty times slower.
_KEY = {name: re.compile(rb'"%s"\s*:\s*' % name.encode()) for name in ("model", "provider")}
_WORD = re.compile(rb'"(?:[^"\\]|\\.)*"|null')
_HIDDEN = re.compile(rb"\\u00[67]")
"""An escaped small letter: with one of these a key may be spelt otherwise."""
_ABSENT = object()


class _Unsure(Exception):
    """Only parsing all of it can tell."""


def model_and_provider(raw: bytes) -> tuple[str, str]:
    """Model and provider that a raw body names, each "" where it names none, as `completion.parse` tells."""
    try:
        return _named(raw, "model"), _named(raw, "provider")
    except _Unsure:
        pass
    try:
        parsed = completion.parse(raw, logprobs=False)
    except TeacherError:
        return "", ""
    return parsed.model, parsed.provider


def _named(raw: bytes, name: str) -> str:
    found: Any = _ABSENT
    if is_stream(raw):
        for event in events(raw):
            if event == DONE:
                break
            value = _at_top(event, name)
            if value is not _ABSENT and (value is not None or found is _ABSENT):
                found = value
    else:
        found = _at_top(raw.removeprefix(b"\xef\xbb\xbf"), name)
    return found if isinstance(found, str) else ""


def _at_top(document: bytes, name: str) -> Any:
    """The value of a member of the outermost object; raises `_Unsure` where its bytes alone don't tell."""
    if _HIDDEN.search(document):
        raise _Unsure
    found = _KEY[name].search(document)
    if found is None:
        return _ABSENT
    word = _WORD.match(document, found.end())
    is_tail = document[found.start() - 1 : found.start()] == b"\\"
    if is_tail or word is None or _KEY[name].search(document, word.end()):
        raise _Unsure
    # The member is the outermost object's if closing it right there, or beginning with it, makes an object.
    is_early = word.end() <= len(document) // 2
    part = document[: word.end()] + b"}" if is_early else b"{" + document[found.start() :]
    try:
        return orjson.loads(part)[name]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise _Unsure from None

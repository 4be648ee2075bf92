"""Read `model` and `provider` from a raw body without parsing all of it. Pure.

The terms check does this for every journalled answer at every start. An answer with log-probabilities is a
megabyte, of which these two fields are a hundred bytes.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from harvester.api.replies import completion
from harvester.api.replies.framing import unframed
from harvester.api.replies.sse import is_end_mark, is_stream, named_events
from harvester.errors import TeacherError

# A quote inside a JSON string is escaped, so these bytes are a member name wherever they occur, except at the
# end of a longer name (checked below: a look-behind would make the search thirty times slower).
_MEMBER = {name: re.compile(rb'"%s"\s*:\s*' % name.encode()) for name in ("model", "provider")}
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|null')
# An escaped lower-case letter: the name of a member may be written with it.
_ESCAPED_LETTER = re.compile(rb"\\u00[67]")
_ABSENT = object()


class _NeedsParsing(Exception):
    """These bytes alone don't tell; the whole body must be parsed."""


def model_and_provider(raw: bytes) -> tuple[str, str]:
    """Return model and provider of a raw body, each "" where it names none, as `completion.parse` does."""
    try:
        if b'"choices"' in raw:  # else it may be in an envelope
            return _string_member(raw, "model"), _string_member(raw, "provider")
    except _NeedsParsing:
        pass
    try:
        parsed = completion.parse(raw, logprobs=False)
    except TeacherError:
        return "", ""
    return parsed.model, parsed.provider


def _string_member(raw: bytes, name: str) -> str:
    """The member of the body, or the last one among the events of a stream; "" when it is no string."""
    value: Any = _ABSENT
    document = unframed(raw)
    if is_stream(document):
        for _, event in named_events(raw):
            if is_end_mark(event):
                break
            member = _top_level_member(event, name)
            if member is not _ABSENT and (member is not None or value is _ABSENT):
                value = member
    else:
        value = _top_level_member(document, name)
    return value if isinstance(value, str) else ""


def _top_level_member(document: bytes, name: str) -> Any:
    """The value of a member of the outermost object, `_ABSENT` where there is none.

    Raises:
        _NeedsParsing: the bytes around the name don't tell whether it belongs to the outermost object.
    """
    if _ESCAPED_LETTER.search(document):
        raise _NeedsParsing
    match = _MEMBER[name].search(document)
    if match is None:
        return _ABSENT
    value = _VALUE.match(document, match.end())
    ends_longer_name = document[match.start() - 1 : match.start()] == b"\\"
    if ends_longer_name or value is None or _MEMBER[name].search(document, value.end()):
        raise _NeedsParsing
    # It belongs to the outermost object if the document is an object when it ends, or begins, right there.
    is_early = value.end() <= len(document) // 2
    part = document[: value.end()] + b"}" if is_early else b"{" + document[match.start() :]
    try:
        return orjson.loads(part)[name]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise _NeedsParsing from None

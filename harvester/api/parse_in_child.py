"""Parse replies that may take long in a child process, so that the event loop never waits for them.

Most replies have some kilobytes and are parsed at once. One of megabytes, or of a hundred thousand list
elements, or one whose JSON Schema has patterns, may take seconds or gigabytes. Such a reply is parsed in a
child process with limits on time and memory; what does not end within them has the outcome `unknown`. Its raw
bytes are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import orjson

from harvester import errors
from harvester.api import charset, model_list
from harvester.api.error_body import RAW_KEPT_BYTES, classify
from harvester.api.redaction import Redactor
from harvester.api.replies import choices, completion
from harvester.api.replies.choices import ChoiceAnswer, Choices
from harvester.api.replies.sse import is_stream
from harvester.api.replies.usage import estimate_tokens
from harvester.api.response_format import has_costly_schema
from harvester.api.scoring.replies import parse_or_unscored, parse_scored, unread
from harvester.api.types import Alternative, Completion, Outcome, TokenLogprob, Usage
from harvester.errors import BrokenAnswer, TeacherError
from harvester.system.limited_child import ChildError, for_text

# Limits of one call in the child.
TIMEOUT_S = 10.0
# A body up to the first size is always parsed at once, and above the second one never. In between it is when
# it has at most MOST_ELEMENTS, MOST_LINES and MOST_TAGS. Measured on one
# core of 2.5 GHz: 25 ms at each of the bounds.
ALWAYS_BYTES = 16 * 1024
NEVER_BYTES = 2 * 1024 * 1024
MOST_ELEMENTS = 100_000
MOST_LINES = 10_000
MOST_TAGS = 10_000
# How tags begin (`shapes`), beside the brackets that are counted as elements; in JSON also as escapes.
_TAG_BEGINNINGS = (b"<", "◁".encode(), b"\\u")
# A stored body up to this size is parsed in the process that reads it: 110 ms for the worst one.
STORED_INLINE_BYTES = 2 * 1024 * 1024
TOKENS_PER_PIECE = 256

_ERROR_FIELDS = ("status", "error_code", "retry_after_s", "maybe_billed", "place", "remedy")
# Two threads: one waits for the child while the other prepares the next call.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="heavy")


def is_heavy(raw: bytes) -> bool:
    """Whether parsing this body may take longer than some 25 ms."""
    if len(raw) <= ALWAYS_BYTES:
        return False
    if len(raw) > NEVER_BYTES or completion.count_elements(raw) > MOST_ELEMENTS:
        return True
    if sum(raw.count(beginning) for beginning in _TAG_BEGINNINGS) > MOST_TAGS:
        return True
    return is_stream(raw) and raw.count(b"\n") + raw.count(b"\r") > MOST_LINES


async def parse(raw: bytes, input_tokens: int, response_format: Any) -> Completion:
    """Parse one response body without its log-probabilities, in a child process where it is heavy.

    Raises:
        TeacherError: as `completion.parse`.
    """
    if not is_heavy(raw):
        if not has_costly_schema(response_format):
            return completion.parse(raw, input_tokens, response_format, logprobs=False)
        # The check of the schema waits for a child of its own.
        checked = await _in_thread(_parse, raw, input_tokens, response_format)
        assert isinstance(checked, Completion)
        return checked
    try:
        asked = orjson.dumps(response_format)
        facts = await _in_child("harvester.api.parse_in_child:facts_of", raw, input_tokens, asked, False)
    except (TimeoutError, MemoryError, ChildError):
        return _unread(raw, input_tokens)
    return _completion_of(facts, raw)


async def split(raw: bytes, asked: int, input_tokens: int, response_format: Any) -> Choices:
    """Split a body by choices, in a child process where it is heavy.

    What can't be split within the limits is one choice with the outcome `unknown`.

    Raises:
        TeacherError: as `choices.split`.
    """
    if not is_heavy(raw):
        if not has_costly_schema(response_format):
            return choices.split(raw, asked, input_tokens, response_format)
        checked = await _in_thread(choices.split, raw, asked, input_tokens, response_format)
        assert isinstance(checked, Choices)
        return checked
    try:
        form = orjson.dumps(response_format)
        facts = await _in_child("harvester.api.parse_in_child:choice_facts", raw, asked, input_tokens, form)
    except (TimeoutError, MemoryError, ChildError):
        unread = _unread(raw, input_tokens)
        return Choices((ChoiceAnswer(raw, unread),), unread.usage)
    if "error" in facts:
        raise _error_of(facts, raw)
    answers = [
        None if row is None else ChoiceAnswer(row["raw"], _completion_of(row["facts"], row["raw"]))
        for row in facts["answers"]
    ]
    return Choices(tuple(answers), Usage(**facts["usage"]), facts["surplus"])


def parse_stored(
    raw: bytes, input_tokens: int, response_format: Mapping[str, Any] | None, *, logprobs: bool
) -> Completion:
    """Parse a body that is stored, for a caller that may wait; a large one in a child process.

    Reading JSON holds the interpreter until its end: in a thread of a run it would block the event loop.

    Raises:
        TeacherError: as `completion.parse`.
    """
    if len(raw) <= STORED_INLINE_BYTES:
        return completion.parse(raw, input_tokens, response_format, logprobs=logprobs)
    asked = orjson.dumps(response_format)
    for with_logprobs in (True, False) if logprobs and b"logprob" in raw else (False,):
        args = (raw, input_tokens, asked, with_logprobs)
        try:
            facts = for_text.call("harvester.api.parse_in_child:facts_of", *args, timeout_s=TIMEOUT_S)
        except (TimeoutError, MemoryError, ChildError):
            continue
        return _completion_of(facts, raw)
    return _unread(raw, input_tokens)


async def parse_score(raw: bytes, body: Mapping[str, Any], input_tokens: int) -> Completion:
    """Read the reply to a scoring request, in a child process where it is heavy.

    Raises:
        TeacherError: as `parse_scored`.
    """
    if not is_heavy(raw):
        return parse_scored(raw, body, input_tokens)
    try:
        facts = await _in_child(
            "harvester.api.parse_in_child:score_facts", raw, orjson.dumps(body), input_tokens, False
        )
    except (TimeoutError, MemoryError, ChildError):
        return unread(body, input_tokens)
    return _completion_of(facts, raw)


def parse_stored_score(
    raw: bytes, body: Mapping[str, Any], input_tokens: int, *, logprobs: bool
) -> Completion:
    """Read the stored reply to a scoring request, for a caller that may wait; unreadable: `unscored`."""
    if len(raw) <= STORED_INLINE_BYTES:
        parsed = parse_or_unscored(raw, body, input_tokens)
        return parsed if logprobs else replace(parsed, logprobs=())
    args = (raw, orjson.dumps(body), input_tokens, logprobs)
    try:
        facts = for_text.call("harvester.api.parse_in_child:score_facts", *args, timeout_s=TIMEOUT_S)
        return _completion_of(facts, raw)
    except (TimeoutError, MemoryError, ChildError, TeacherError):
        return unread(body, input_tokens)


async def is_complete(raw: bytes) -> bool:
    """Whether a body whose transfer had no proper end is complete; False where it takes too long to tell."""
    if not is_heavy(raw):
        return completion.is_complete(raw)
    try:
        return bool(await _in_child("harvester.api.replies.completion:is_complete", raw))
    except (TimeoutError, MemoryError, ChildError):
        return False


async def as_utf8(raw: bytes, content_type: str) -> bytes:
    """Return a body in UTF-8; unchanged where it is, or can't be read, or takes too long to tell."""
    if not charset.needs_reading(raw, content_type):
        return raw
    if not is_heavy(raw):
        return charset.as_utf8(raw, content_type)
    try:
        return bytes(await _in_child("harvester.api.charset:as_utf8", raw, content_type))
    except (TimeoutError, MemoryError, ChildError):
        return raw


async def has_choices(raw: bytes) -> bool:
    """Whether a body holds an answer; True where it takes too long to tell: nothing else is as large."""
    return is_heavy(raw) or completion.has_choices(raw)


async def redact(redactor: Redactor, body: bytes) -> bytes:
    """Remove the credential from a body.

    Raises:
        BrokenAnswer: the body can't be searched for it within the limits, so it must not be stored.
    """
    if not is_heavy(body) or not redactor.is_active:
        return redactor.body(body)
    try:
        redacted = await _in_child("harvester.api.parse_in_child:redact_now", redactor.secret, body)
    except (TimeoutError, MemoryError, ChildError):
        raise BrokenAnswer(
            "the reply is too large to be searched for the key", status=200, maybe_billed=True
        ) from None
    assert isinstance(redacted, bytes)
    return redacted


async def refusal(status: int, headers: Mapping[str, str], body: bytes, place: str) -> TeacherError:
    """Return the error of a reply that is no answer; of a heavy body that can't be read, by its status."""
    if not is_heavy(body):
        return classify(status, headers, body, place=place)
    try:
        facts = await _in_child(
            "harvester.api.parse_in_child:refusal_facts", status, dict(headers), body, place
        )
    except (TimeoutError, MemoryError, ChildError):
        return classify(status, headers, b"", place=place)
    return _error_of(facts, body[:RAW_KEPT_BYTES], headers)


async def model_ids(body: bytes) -> list[str]:
    """Return the model ids in the body of a list of models; empty where it can't be read."""
    if not is_heavy(body):
        return model_list.parse(body)
    try:
        return list(await _in_child("harvester.api.model_list:parse", body))
    except (TimeoutError, MemoryError, ChildError):
        return []


def _parse(raw: bytes, input_tokens: int, response_format: Mapping[str, Any] | None) -> Completion:
    return completion.parse(raw, input_tokens, response_format, logprobs=False)


def redact_now(secret: str, body: bytes) -> bytes:
    """Remove a credential from a body (in the child)."""
    return Redactor(secret).body(body)


def facts_of(raw: bytes, input_tokens: int, response_format: bytes, logprobs: bool) -> dict[str, Any]:
    """Parse a body (in the child); return the fields of its completion, or those of the error.

    Log-probabilities are returned in pieces of JSON, each of some milliseconds to read.
    """
    try:
        parsed = completion.parse(raw, input_tokens, orjson.loads(response_format), logprobs=logprobs)
    except TeacherError as error:
        return _facts_of_error(error)
    return _facts_of_completion(parsed)


def score_facts(raw: bytes, body: bytes, input_tokens: int, logprobs: bool) -> dict[str, Any]:
    """Read the reply to a scoring request (in the child); return the same as `facts_of`."""
    try:
        parsed = parse_scored(raw, orjson.loads(body), input_tokens)
    except TeacherError as error:
        return _facts_of_error(error)
    return _facts_of_completion(parsed if logprobs else replace(parsed, logprobs=()))


def choice_facts(raw: bytes, asked: int, input_tokens: int, response_format: bytes) -> dict[str, Any]:
    """Split a body by choices (in the child); return body and completion of each, or the error."""
    try:
        parsed = choices.split(raw, asked, input_tokens, orjson.loads(response_format))
    except TeacherError as error:
        return _facts_of_error(error)
    answers = [
        answer and {"raw": answer.raw, "facts": _facts_of_completion(answer.completion)}
        for answer in parsed.answers
    ]
    return {"answers": answers, "usage": asdict(parsed.usage), "surplus": parsed.surplus}


def _facts_of_completion(parsed: Completion) -> dict[str, Any]:
    tokens = parsed.logprobs
    pieces = [
        orjson.dumps([_packed(token) for token in tokens[start : start + TOKENS_PER_PIECE]])
        for start in range(0, len(tokens), TOKENS_PER_PIECE)
    ]
    return asdict(replace(parsed, logprobs=())) | {"logprobs": pieces}


def _packed(token: TokenLogprob) -> list[Any]:
    return [*_packed_alternative(token), [_packed_alternative(other) for other in token.top]]


def _packed_alternative(token: TokenLogprob | Alternative) -> list[Any]:
    return [token.token, None if token.data is None else token.data.hex(), token.logprob]


def _unpacked(values: list[Any]) -> TokenLogprob:
    *own, top = values
    return TokenLogprob(*_unpacked_data(own), tuple(Alternative(*_unpacked_data(other)) for other in top))


def _unpacked_data(values: list[Any]) -> tuple[str, bytes | None, float | None]:
    token, data, logprob = values
    return token, None if data is None else bytes.fromhex(data), logprob


def _completion_of(facts: Mapping[str, Any], raw: bytes) -> Completion:
    """Make the completion of what the child returned.

    Raises:
        TeacherError: the body holds none.
    """
    if "error" in facts:
        raise _error_of(facts, raw)
    given = {"outcome": Outcome(facts["outcome"]), "usage": Usage(**facts["usage"])}
    tokens = tuple(_unpacked(token) for piece in facts["logprobs"] for token in orjson.loads(piece))
    return Completion(**{**facts, **given, "logprobs": tokens})


def _unread(raw: bytes, input_tokens: int) -> Completion:
    usage = Usage(input_tokens, estimate_tokens(len(raw)), source="estimated")
    return Completion(None, Outcome.UNKNOWN, "", usage)


def refusal_facts(status: int, headers: dict[str, str], body: bytes, place: str) -> dict[str, Any]:
    """Read a reply that is no answer (in the child); return the fields of its error."""
    return _facts_of_error(classify(status, headers, body, place=place))


def _facts_of_error(error: TeacherError) -> dict[str, Any]:
    facts = {name: getattr(error, name) for name in _ERROR_FIELDS}
    return {"error": type(error).__name__, "message": error.message, "has_raw": bool(error.raw), **facts}


def _error_of(facts: Mapping[str, Any], raw: bytes, headers: Mapping[str, str] | None = None) -> TeacherError:
    kind: type[TeacherError] = getattr(errors, facts["error"])
    given = {name: facts[name] for name in _ERROR_FIELDS}
    return kind(facts["message"], raw=raw if facts["has_raw"] else b"", headers=headers or {}, **given)


async def _in_child(function: str, *args: Any) -> Any:
    return await _in_thread(lambda: for_text.call(function, *args, timeout_s=TIMEOUT_S))


async def _in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)

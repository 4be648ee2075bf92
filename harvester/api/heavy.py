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
from dataclasses import asdict
from typing import Any

import orjson

from harvester import errors
from harvester.api import completion
from harvester.api.redaction import Redactor
from harvester.api.response_format import has_costly_schema
from harvester.api.sse import is_stream
from harvester.api.types import Completion, Outcome, Usage
from harvester.api.usage import estimate_tokens
from harvester.errors import BrokenAnswer, TeacherError
from harvester.system.limited_child import ChildError, LimitedChild

# Limits of one call in the child.
TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
# A body up to the first size is always parsed at once, and above the second one never. In between it is when
# it has at most MOST_ELEMENTS and MOST_LINES. Measured on one core of 2.5 GHz: 25 ms at each of the bounds.
ALWAYS_BYTES = 16 * 1024
NEVER_BYTES = 2 * 1024 * 1024
MOST_ELEMENTS = 100_000
MOST_LINES = 10_000

_ERROR_FIELDS = ("status", "error_code", "retry_after_s", "maybe_billed", "place", "remedy")
_child = LimitedChild(MEMORY_BYTES)
# Two threads: one waits for the child while the other prepares the next call.
_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="heavy")


def is_heavy(raw: bytes) -> bool:
    """Whether parsing this body may take longer than some 25 ms."""
    if len(raw) <= ALWAYS_BYTES:
        return False
    if len(raw) > NEVER_BYTES or completion.count_elements(raw) > MOST_ELEMENTS:
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
        facts = await _in_child("harvester.api.heavy:facts_of", raw, input_tokens, asked)
    except (TimeoutError, MemoryError, ChildError):
        usage = Usage(input_tokens, estimate_tokens(len(raw)), source="estimated")
        return Completion(None, Outcome.UNKNOWN, "", usage)
    if "error" in facts:
        raise _error_of(facts, raw)
    return Completion(**{**facts, "outcome": Outcome(facts["outcome"]), "usage": Usage(**facts["usage"])})


async def is_complete(raw: bytes) -> bool:
    """Whether a body whose transfer had no proper end is complete; False where it takes too long to tell."""
    if not is_heavy(raw):
        return completion.is_complete(raw)
    try:
        return bool(await _in_child("harvester.api.completion:is_complete", raw))
    except (TimeoutError, MemoryError, ChildError):
        return False


async def redact(redactor: Redactor, body: bytes) -> bytes:
    """Remove the credential from a body.

    Raises:
        BrokenAnswer: the body can't be searched for it within the limits, so it must not be stored.
    """
    if not is_heavy(body) or not redactor.is_active:
        return redactor.body(body)
    try:
        redacted = await _in_child("harvester.api.heavy:redact_now", redactor.secret, body)
    except (TimeoutError, MemoryError, ChildError):
        raise BrokenAnswer(
            "the reply is too large to be searched for the key", status=200, maybe_billed=True
        ) from None
    assert isinstance(redacted, bytes)
    return redacted


def _parse(raw: bytes, input_tokens: int, response_format: Mapping[str, Any] | None) -> Completion:
    return completion.parse(raw, input_tokens, response_format, logprobs=False)


def redact_now(secret: str, body: bytes) -> bytes:
    """Remove a credential from a body (in the child)."""
    return Redactor(secret).body(body)


def facts_of(raw: bytes, input_tokens: int, response_format: bytes) -> dict[str, Any]:
    """Parse a body (in the child); return the fields of its completion, or those of the error."""
    try:
        parsed = _parse(raw, input_tokens, orjson.loads(response_format))
    except TeacherError as error:
        facts = {name: getattr(error, name) for name in _ERROR_FIELDS}
        return {"error": type(error).__name__, "message": error.message, "has_raw": bool(error.raw), **facts}
    return asdict(parsed) | {"logprobs": ()}


def _error_of(facts: Mapping[str, Any], raw: bytes) -> TeacherError:
    kind: type[TeacherError] = getattr(errors, facts["error"])
    given = {name: facts[name] for name in _ERROR_FIELDS}
    return kind(facts["message"], raw=raw if facts["has_raw"] else b"", **given)


async def _in_child(function: str, *args: Any) -> Any:
    return await _in_thread(lambda: _child.call(function, *args, timeout_s=TIMEOUT_S))


async def _in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)

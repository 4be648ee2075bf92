"""Classify a reply that is not an answer: status, headers and body -> one class of the error tree. Pure.

Nothing here waits or retries. The error says what happened, how long the teacher asked us to wait, and what
the operator can do. Excerpts of bodies come from outside: they are cut short, and anything that looks like a
key, and control characters, are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import orjson

from harvester.api.error_fields import ErrorFields, error_by_words, error_of_reply, find_error
from harvester.api.http_values import is_epoch, parse_date, parse_number, reset_seconds
from harvester.errors import (
    BrokenAnswer,
    PromptRejected,
    RateLimited,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)

EXCERPT_CHARS = 200
RAW_KEPT_BYTES = 2048
# A longer `Retry-After` is cut to a day: it is a mistake or a daily quota.
MAX_RETRY_AFTER_S = 86_400.0

# Error codes of a wrong configuration.
SETUP_CODES = frozenset({"model_not_found", "unsupported_model", "invalid_model", "invalid_api_key"})
# Status -> what happened, what to do.
_REFUSED = {
    401: ("the key is not accepted", "check the variable named in api_key_env"),
    402: ("the account has no credit or quota left", "top up, then resume"),
    403: ("this account may not do this", "check the account, its region and the model"),
    404: ("no such model or path", "check model, and base_url with its /v1"),
}
_KEYLIKE = re.compile(r"\b((?:sk|pk|gsk|xai|key|org)[-_])[\w*.\-]{6,}|(?i:bearer)\s+\S{6,}")
# Where an error of a reply with status 200 was found.
_EVENT, _INSIDE = "an error event in the stream", "an error inside a reply with status 200"
# A gateway lost its connection to the teacher, which may have answered, and charged, all the same.
_GATEWAY_LOST = frozenset({502, 504, 520, 524})
# Statuses that are about this one request, whatever the body says.
_TOO_LARGE = frozenset({413, 414, 431})
# Statuses that are about this one request if the body gives a reason. Proxies send them without one.
_INVALID = frozenset({400, 422})


def classify(
    status: int, headers: Mapping[str, str], body: bytes, *, place: str = "", secret: str | None = None
) -> TeacherError:
    """Return the error that a reply without a completion means.

    Args:
        status: HTTP status, or the one an error inside a 200 stands for.
        headers: with lower-case names.
        place: host and path, for the message.
        secret: replaced wherever the body contains it.
    """
    fields = _fields_of(body, headers)
    if secret is not None:
        fields = replace(fields, message=fields.message.replace(secret, "***"))
    return _error(status, headers, body, fields, source=f"HTTP {status}", place=place)


def error_inside(document: Any, body: bytes, *, is_stream: bool = False) -> TeacherError | None:
    """Return the error inside the body of a 200, None when there is none.

    Its message says where the error was and which HTTP status it stands for. A BrokenAnswer is one whose
    meaning is not known; its message quotes the teacher.
    """
    fields = find_error(document) or (None if is_stream else error_by_words(document))
    if fields is None:
        return None
    status = 451 if fields.is_moderated else fields.status_by_words()
    if status:
        source = f"{_EVENT if is_stream else _INSIDE} that means HTTP {status}"
        return _error(status, {}, body, fields, source=source)
    message = f"{_EVENT} after status 200" if is_stream else "status 200 with an error inside"
    return BrokenAnswer(f"{message}: {excerpt(fields.message)}", status=200, error_code=fields.code, raw=body)


def _error(
    status: int, headers: Mapping[str, str], body: bytes, fields: ErrorFields, *, source: str, place: str = ""
) -> TeacherError:
    """Make the error of a reply; `source` says where it was found and begins the message."""
    error_class, summary, remedy = _classify(source, status, fields, headers)
    detail = excerpt(fields.message)
    return error_class(
        f"{summary}: {detail}" if detail else summary,
        status=status,
        error_code=fields.code,
        retry_after_s=retry_after_s(headers) if not error_class.is_permanent else None,
        raw=body[:RAW_KEPT_BYTES],
        maybe_billed=status in _GATEWAY_LOST,
        headers=headers,
        place=place,
        remedy=remedy,
    )


def _classify(
    source: str, status: int, fields: ErrorFields, headers: Mapping[str, str]
) -> tuple[type[TeacherError], str, str]:
    """Error class, summary and remedy for a status and what the teacher says."""
    if 300 <= status < 400:
        host = excerpt(_host_of(headers.get("location", ""))) or "an unnamed host"
        remedy = (
            "redirects are not followed, they would carry the key along; put the final address in base_url"
        )
        return TeacherRefused, f"{source} redirects to {host}", remedy
    if fields.is_quota or (status in _INVALID and not fields.is_moderated and _has_no_credit(fields)):
        return TeacherRefused, f"{source}, {_REFUSED[402][0]}", _REFUSED[402][1]
    if fields.is_moderated and status in {400, 403, 422, 451}:
        return PromptRejected, f"{source}, the prompt is moderated", ""
    if fields.code in SETUP_CODES:
        return TeacherRefused, f"{source}, {_REFUSED[404][0]}", _REFUSED[404][1]
    if status in _REFUSED:
        return TeacherRefused, f"{source}, {_REFUSED[status][0]}", _REFUSED[status][1]
    return _classify_request_error(source, status, fields, headers)


def _host_of(location: str) -> str:
    """The host of a Location header; "" where it is no URL."""
    try:
        return urlsplit(location[:2048]).netloc
    except ValueError:  # `http://[evil`
        return ""


def _has_no_credit(fields: ErrorFields) -> bool:
    """Whether an invalid request is one for the account's credit, by its words."""
    return replace(fields, status=0).status_by_words() == 402


def _classify_request_error(
    source: str, status: int, fields: ErrorFields, headers: Mapping[str, str]
) -> tuple[type[TeacherError], str, str]:
    """The same for errors of this one request: try again later, or never."""
    names_wait = "retry-after" in headers or "retry-after-ms" in headers
    if status in {429, 529} or (status == 503 and names_wait):
        return RateLimited, f"{source}, the teacher asks for patience", ""
    if status >= 500:
        return TeacherUnavailable, f"{source}, the teacher failed", ""
    is_page = fields.message.lstrip().startswith("<")
    if status in _TOO_LARGE or (status in _INVALID and fields.message and not is_page):
        return PromptRejected, f"{source}, the request is not accepted", ""
    if status in _INVALID:
        return TeacherUnavailable, f"{source}, the request is not accepted, and no reason is given", ""
    if 400 <= status < 500:  # 408, 409, 425, and those that vendors invent, such as 498 and 499
        return TeacherUnavailable, f"{source}, the request failed", ""
    return BrokenAnswer, f"{source} where 200 was expected", ""


def _fields_of(body: bytes, headers: Mapping[str, str]) -> ErrorFields:
    """What the body of a reply says; of one that isn't JSON its first words, of a web page nothing."""
    try:
        return error_of_reply(orjson.loads(body))
    except (orjson.JSONDecodeError, RecursionError):
        text = body[: 4 * EXCERPT_CHARS].decode("utf-8", "replace")
        return ErrorFields(message=text)


def excerpt(text: str) -> str:
    """Return one short line that is safe to print: no control characters, nothing that looks like a key."""
    masked = _KEYLIKE.sub("***", text)
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in masked)
    shown = " ".join(shown.replace("\N{REPLACEMENT CHARACTER}", " ").split())
    return shown if len(shown) <= EXCERPT_CHARS else shown[: EXCERPT_CHARS - 1] + "…"


def describe(error: BaseException) -> str:
    """Return class and text of any exception as one short line; also of one whose text can't be had."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an exception made by a library without its arguments
        text = ""
    return excerpt(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return seconds the teacher asks us to wait, 0 to a day; None when it names no time that can be read.

    `retry-after-ms` wins over `retry-after` (seconds, also fractions, an HTTP date, or as some servers write
    it `20s`, ISO 8601 or an epoch time). A time is taken relative to the reply's own Date header, so a wrong
    local clock does not matter.
    """
    in_ms = parse_number(headers.get("retry-after-ms"))
    if in_ms is not None:
        return _clamped(in_ms / 1000)
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = parse_number(value)
    if seconds is None or is_epoch(seconds):
        seconds = _seconds_until(value, headers.get("date"))
    return None if seconds is None else _clamped(seconds)


def _seconds_until(date: str, server_date: str | None) -> float | None:
    until, now = parse_date(date), parse_date(server_date)
    if until is None:
        return reset_seconds(date, server_date)
    return None if now is None else until - now


def _clamped(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)

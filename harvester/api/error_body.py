"""Classify a reply that is not an answer: status, headers and body -> one class of the error tree. Pure.

Nothing here waits or retries. The error says what happened, how long the teacher asked us to wait, and what
the operator can do. Excerpts of bodies come from outside: they are cut short, and anything that looks like a
key, and control characters, are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import orjson

from harvester.api.http_values import parse_date, parse_number
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

# Error codes of an account without credit.
_QUOTA = frozenset(
    {
        "insufficient_quota",
        "insufficient_balance",
        "insufficient_credits",
        "credit_balance_exhausted",
        "billing_hard_limit_reached",
        "billing_not_active",
        "account_deactivated",
        "access_terminated",
        "exceeded_current_quota_error",
    }
)
_QUOTA_ENDINGS = ("_spend_limit_exceeded", "_usage_limit_exceeded")
# Error codes of a prompt that content moderation rejects.
_MODERATION = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "data_inspection_failed",
        "invalid_prompt",
        "moderation",
        "moderation_blocked",
        "responsible_ai_policy_violation",
    }
)
# Error codes of a wrong configuration.
_SETUP_CODES = frozenset({"model_not_found", "unsupported_model", "invalid_model", "invalid_api_key"})
# Status -> what happened, what to do.
_REFUSED = {
    401: ("the key is not accepted", "check the variable named in api_key_env"),
    402: ("the account has no credit or quota left", "top up, then resume"),
    403: ("this account may not do this", "check the account, its region and the model"),
    404: ("no such model or path", "check model, and base_url with its /v1"),
}
_KEYLIKE = re.compile(r"\b((?:sk|pk|gsk|xai|key|org)[-_])[\w*.\-]{6,}|(?i:bearer)\s+\S{6,}")
# A gateway lost its connection to the teacher, which may have answered, and charged, all the same.
_GATEWAY_LOST = frozenset({502, 504, 520, 524})
# The HTTP status that an error type inside a 200 stands for.
_STATUS_OF_TYPE = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "requests": 429,
    "tokens": 429,
    "overloaded_error": 529,
    "server_overloaded": 503,
    "server_error": 500,
    "api_error": 500,
    "timeout_error": 504,
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
}


def classify(
    status: int, headers: Mapping[str, str], body: bytes, *, place: str = "", secret: str | None = None
) -> TeacherError:
    """The error that a reply without a completion means.

    Args:
        status: HTTP status, or the one an error inside a 200 stands for.
        headers: with lower-case names.
        place: host and path, for the message.
        secret: replaced wherever the body contains it.
    """
    code, message = _error_of(body)
    error_class, summary, remedy = _classify(status, code, headers)
    detail = excerpt(message if secret is None else message.replace(secret, "***"))
    return error_class(
        f"{summary}: {detail}" if detail else summary,
        status=status,
        error_code=code,
        retry_after_s=retry_after_s(headers) if not error_class.is_permanent else None,
        raw=body[:RAW_KEPT_BYTES],
        maybe_billed=status in _GATEWAY_LOST,
        headers=headers,
        place=place,
        remedy=remedy,
    )


def error_inside(document: Mapping[str, Any], body: bytes) -> TeacherError | None:
    """The error inside the body of a 200, None when there is none."""
    error = document.get("error")
    if not error:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    number = int(code) if isinstance(code, int | str) and str(code).isdigit() else 0
    error_type = str(error.get("type") or code or "") if isinstance(error, dict) else ""
    status = number if 400 <= number <= 599 else _STATUS_OF_TYPE.get(error_type, 0)
    if not status and isinstance(code, str):
        status = 429 if _is_quota(code) else _STATUS_OF_TYPE.get(code, 0)
    if status:
        return classify(status, {}, body)
    message = excerpt(_error_of(body)[1])
    return BrokenAnswer(f"status 200 with an error inside: {message}", status=200, raw=body)


def _classify(status: int, code: str, headers: Mapping[str, str]) -> tuple[type[TeacherError], str, str]:
    """Error class, summary and remedy for a status and the teacher's own code."""
    if 300 <= status < 400:
        host = excerpt(urlsplit(headers.get("location", "")).netloc) or "an unnamed host"
        remedy = (
            "redirects are not followed, they would carry the key along; put the final address in base_url"
        )
        return TeacherRefused, f"HTTP {status} redirects to {host}", remedy
    if _is_quota(code):
        return TeacherRefused, f"HTTP {status}, {_REFUSED[402][0]}", _REFUSED[402][1]
    if code in _MODERATION and status in {400, 403, 422}:
        return PromptRejected, f"HTTP {status}, the prompt is moderated", ""
    if code in _SETUP_CODES:
        return TeacherRefused, f"HTTP {status}, {_REFUSED[404][0]}", _REFUSED[404][1]
    if status in _REFUSED:
        return TeacherRefused, f"HTTP {status}, {_REFUSED[status][0]}", _REFUSED[status][1]
    return _classify_request_error(status, headers)


def _classify_request_error(status: int, headers: Mapping[str, str]) -> tuple[type[TeacherError], str, str]:
    """The same for errors of this one request: try again later, or never."""
    names_wait = "retry-after" in headers or "retry-after-ms" in headers
    if status in {429, 529} or (status == 503 and names_wait):
        return RateLimited, f"HTTP {status}, the teacher asks for patience", ""
    if status in {408, 409, 425} or status >= 500:
        return TeacherUnavailable, f"HTTP {status}, the teacher failed", ""
    if 400 <= status < 500:
        return PromptRejected, f"HTTP {status}, the request is not accepted", ""
    return BrokenAnswer, f"HTTP {status} where 200 was expected", ""


def _is_quota(code: str) -> bool:
    return code in _QUOTA or code.endswith(_QUOTA_ENDINGS)


def _error_of(body: bytes) -> tuple[str, str]:
    """The teacher's error code (or type) and message; "" and the start of the body when it isn't JSON."""
    try:
        document = orjson.loads(body)
    except (orjson.JSONDecodeError, RecursionError):
        return "", body[: 4 * EXCERPT_CHARS].decode("utf-8", "replace")
    error = document.get("error", document) if isinstance(document, dict) else document
    if not isinstance(error, dict):
        return "", str(error)[: 4 * EXCERPT_CHARS]
    code = error.get("code")
    name = code if isinstance(code, str) and not code.isdigit() else error.get("type")
    message = error.get("message") or error.get("detail") or ""
    return str(name or "")[:100], str(message)[: 4 * EXCERPT_CHARS]


def excerpt(text: str) -> str:
    """One short line that is safe to print: no control characters, nothing that looks like a key."""
    masked = _KEYLIKE.sub("***", text)
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in masked)
    shown = " ".join(shown.replace("\N{REPLACEMENT CHARACTER}", " ").split())
    return shown if len(shown) <= EXCERPT_CHARS else shown[: EXCERPT_CHARS - 1] + "…"


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds the teacher asks us to wait, 0 to a day; None when it names no time that can be read.

    `retry-after-ms` wins over `retry-after` (seconds, also fractions, or an HTTP date). A date is
    taken relative to the reply's own Date header, so a wrong local clock does not matter.
    """
    in_ms = parse_number(headers.get("retry-after-ms"))
    if in_ms is not None:
        return _clamped(in_ms / 1000)
    value = headers.get("retry-after")
    if value is None:
        return None
    seconds = parse_number(value)
    if seconds is None:
        seconds = _seconds_until(value, headers.get("date"))
    return None if seconds is None else _clamped(seconds)


def _seconds_until(date: str, server_date: str | None) -> float | None:
    until, now = parse_date(date), parse_date(server_date)
    return None if until is None or now is None else until - now


def _clamped(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S)

"""Find the error in a reply's body, wherever a vendor puts it, and read what it says. Pure.

An error may be at the top, in a choice, in a message, or in a vendor's envelope, as an object, a text or a
number next to a message. `find_error` gives one `ErrorFields` with the teacher's own words, None where the
body holds no error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harvester.api.shapes.envelopes import choices_of

MAX_WORDS = 800

# Members that hold an error, at the top, in a choice, in its message and in an envelope.
ERROR_MEMBERS = ("error", "Error", "errors", "err", "exception")
# Members with an error's code, its type and its words, in the order in which they are asked.
CODE_MEMBERS = (
    "code",
    "Code",
    "error_code",
    "errorCode",
    "errcode",
    "err_code",
    "status_code",
    "statusCode",
    "status",
)
TYPE_MEMBERS = ("type", "error_type", "reason")
MESSAGE_MEMBERS = (
    "message",
    "Message",
    "msg",
    "error_msg",
    "errorMsg",
    "errmsg",
    "err_msg",
    "status_msg",
    "error_message",
    "errorMessage",
    "error_description",
    "detail",
    "description",
)
# Envelopes in which a vendor reports errors next to, or around, the answer.
ERROR_ENVELOPES = (
    "header",
    "Response",
    "response",
    "data",
    "result",
    "output",
    "body",
    "detail",
)
_MAX_DEPTH = 4
_SUCCESS = frozenset(
    {"", "0", "200", "20000", "ok", "success", "succeeded", "none", "null", "false", "completed"}
    | {"nil", "<nil>", "undefined", "no error"}
)

# Error codes of an account without credit.
_QUOTA = frozenset(
    {
        "insufficient_quota",
        "insufficient_balance",
        "insufficient_credits",
        "insufficient_user_quota",
        "credit_balance_exhausted",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        "payment_required",
        "account_deactivated",
        "access_terminated",
        "exceeded_current_quota_error",
        "arrearage",
        "accountoverdueerror",
    }
)
_QUOTA_ENDINGS = ("_spend_limit_exceeded", "_usage_limit_exceeded")
# Error codes of a prompt that content moderation rejects.
MODERATION_CODES = frozenset(
    {
        "content_filter",
        "content_policy_violation",
        "data_inspection_failed",
        "datainspectionfailed",
        "invalid_prompt",
        "moderation",
        "moderation_blocked",
        "responsible_ai_policy_violation",
        "responsibleaipolicyviolation",
        "content_moderation",
        "sensitive_content",
    }
)
# HTTP statuses that vendors' own numbers stand for: MiniMax (`base_resp`), Zhipu (four digits in `code`).
_BASE_RESP = {
    1001: 504,
    1002: 429,
    1004: 401,
    1008: 402,
    1026: 451,
    1027: 451,
    1039: 429,
    1041: 429,
    1042: 400,
    2013: 400,
    2049: 401,
    2056: 402,
}
_FOUR_DIGITS = {
    1000: 401,
    1001: 401,
    1002: 401,
    1003: 401,
    1113: 402,
    1211: 404,
    1301: 451,
    1302: 429,
    1303: 429,
    1304: 429,
    1305: 529,
}
# The HTTP status that an error's code, type or status name stands for, without case and punctuation.
_STATUS_OF_NAME = {
    "ratelimitexceeded": 429,
    "ratelimiterror": 429,
    "ratelimit": 429,
    "ratelimited": 429,
    "toomanyrequests": 429,
    "requests": 429,
    "tokens": 429,
    "resourceexhausted": 429,
    "throttlingexception": 429,
    "overloadederror": 529,
    "overloaded": 529,
    "engineoverloaded": 529,
    "engineoverloadederror": 529,
    "serveroverloaded": 503,
    "serviceunavailable": 503,
    "serviceunavailableerror": 503,
    "unavailable": 503,
    "capacityexceeded": 503,
    "servererror": 500,
    "internalerror": 500,
    "internalservererror": 500,
    "internal": 500,
    "apierror": 500,
    "badgateway": 502,
    "upstreamerror": 502,
    "providererror": 502,
    "timeouterror": 504,
    "timeout": 504,
    "gatewaytimeout": 504,
    "deadlineexceeded": 504,
    "requesttimeout": 504,
    "invalidrequesterror": 400,
    "invalidrequest": 400,
    "badrequest": 400,
    "badrequesterror": 400,
    "invalidargument": 400,
    "invalidparameter": 400,
    "contextlengthexceeded": 400,
    "authenticationerror": 401,
    "unauthorized": 401,
    "unauthenticated": 401,
    "invalidapikey": 401,
    "invalidauthentication": 401,
    "permissionerror": 403,
    "permissiondenied": 403,
    "accessdenied": 403,
    "forbidden": 403,
    "notfounderror": 404,
    "notfound": 404,
    "modelnotfound": 404,
}
_PUNCTUATION = re.compile(r"[^a-z0-9]+")
# What the words of an error say where its code says nothing; the first that matches counts.
_STATUS_OF_WORDS = tuple(
    (status, re.compile(words, re.IGNORECASE))
    for status, words in (
        (429, r"rate.?limit|too many requests|requests per (second|minute|day)|\bqps\b|throttl"),
        (
            402,
            r"insufficient.{0,12}(balance|credit|fund|quota)"
            r"|(balance|credits?) (is )?(too low|insufficient|exhausted)"
            r"|out of (credit|quota)|no credit|exceeded your (current )?quota|payment required|余额不足|欠费",
        ),
        (
            401,
            r"(invalid|incorrect|missing|expired|no) .{0,8}api.?key|unauthori[sz]ed|authenticat(e|ion) fail",
        ),
        (
            529,
            r"overloaded|(at|over) capacity|try again (later|in)|server (is )?busy|temporarily unavailable",
        ),
        (504, r"timed? ?out|deadline exceeded"),
        (400, r"context (length|window)|too (long|many tokens)|maximum (context|length)|max_tokens"),
        (502, r"upstream|bad gateway|provider (returned|failed)|connection (reset|closed|error|refused)"),
        (500, r"internal( server)? error|server had an error|something went wrong|cuda|out of memory"),
    )
)
_MODERATION_WORDS = re.compile(
    r"\bflagged\b|moderat|content.?(policy|filter|management)|safety (system|polic|filter|reason)"
    r"|responsible ai"
    r"|(inappropriate|harmful|unsafe|sensitive|prohibited|disallowed) (content|input|prompt|words?)"
    r"|(prompt|input|content) (was|is|has been|may) .{0,24}(block|reject|violat|sensitive|inappropr)|敏感",
    re.IGNORECASE,
)
# Only with these statuses (0: none is known) do words about content mean the prompt.
_STATUSES_OF_PROMPTS = frozenset({0, 400, 403, 422, 451})
# An account, a place or a model that is shut out is no matter of the prompt.
_ACCOUNT_WORDS = re.compile(
    r"\b(account|organi[sz]ation|project|api.?key|region|country|territory|ip address|subscription|plan)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ErrorFields:
    """What an error says.

    Attributes:
        code: the teacher's own code, or type; "" for none.
        message: the teacher's words; the start of the error where it has no message.
        status: HTTP status that it stands for by its code, 0 where that is not known.
        is_moderated: content moderation rejected the prompt.
    """

    code: str = ""
    message: str = ""
    status: int = 0
    is_moderated: bool = False

    @property
    def is_quota(self) -> bool:
        """Whether the account has no credit left, by the code."""
        return is_quota(self.code)

    def status_by_words(self) -> int:
        """Return the status by code, else by the words of the error; 0 where neither says it."""
        if self.status:
            return self.status
        return next((status for status, words in _STATUS_OF_WORDS if words.search(self.message)), 0)


def is_quota(code: str) -> bool:
    """Whether an error code means an account without credit."""
    return code.lower() in _QUOTA or code.lower().endswith(_QUOTA_ENDINGS)


def find_error(document: Any) -> ErrorFields | None:
    """Return the error in a body; None where it holds none."""
    return _find(document, 0)


def error_by_words(document: Any) -> ErrorFields | None:
    """Return the error that a body without an answer tells in words alone; None where they say nothing."""
    if not isinstance(document, Mapping) or choices_of(document)[0] is not None:
        return None
    if not any(isinstance(document.get(name), str) for name in MESSAGE_MEMBERS):
        return None
    fields = _fields(document)
    return fields if fields.is_moderated or fields.status_by_words() else None


def error_of_reply(document: Any) -> ErrorFields:
    """Return what the body of a reply with an error status says, in whatever form."""
    fields = _find(document, 0)
    if fields is not None:
        return fields
    if isinstance(document, Mapping):
        return _fields(document)
    return ErrorFields(message=_words(document))


def _find(document: Any, depth: int) -> ErrorFields | None:
    if isinstance(document, list) and len(document) == 1:
        document = document[0]
    if not isinstance(document, Mapping) or depth > _MAX_DEPTH:
        return None
    for name in ERROR_MEMBERS:
        if name in document and _is_error(document[name]):
            return _read(document[name], document)
    return _error_around_choices(document) or _error_of_vendor(document, depth)


def _error_around_choices(document: Mapping[str, Any]) -> ErrorFields | None:
    """The error in a choice or its message; without choices the failure that the object itself reports."""
    choices = document.get("choices")
    if isinstance(choices, list) and choices:
        for choice in choices:
            for holder in _holders(choice):
                if _is_error(holder.get("error")):
                    return _read(holder["error"], holder)
    elif _is_failure(document):
        fields = _fields(document)
        if fields.status or choices_of(document)[0] is None:
            return fields
    return None


def _error_of_vendor(document: Mapping[str, Any], depth: int) -> ErrorFields | None:
    """The error in a vendor's own members."""
    reported = document.get("base_resp")
    if isinstance(reported, Mapping) and not _is_success(reported.get("status_code")):
        return _fields(reported, _BASE_RESP)
    feedback = document.get("promptFeedback")
    if isinstance(feedback, Mapping) and feedback.get("blockReason"):
        words = f"blocked: {_words(feedback['blockReason'])}"
        return ErrorFields("moderation", words, 451, is_moderated=True)
    for name in ERROR_ENVELOPES:
        fields = _find(document[name], depth + 1) if document.get(name) is not None else None
        if fields is not None:
            return fields
    return None


def _holders(choice: Any) -> list[Mapping[str, Any]]:
    if not isinstance(choice, Mapping):
        return []
    return [choice, *(choice[name] for name in ("message", "delta") if isinstance(choice.get(name), Mapping))]


def _is_success(code: Any) -> bool:
    return code is None or code is False or str(code).strip().lower() in _SUCCESS


def _is_error(value: Any) -> bool:
    """Whether the value of an error member says that there is one."""
    if value is None:  # most bodies have none of the members
        return False
    if isinstance(value, str):
        return value.strip().lower() not in _SUCCESS
    if isinstance(value, Mapping):
        if "code" in value and value["code"] is not None and _is_success(value["code"]):
            return False
        return any(
            item not in (None, "", [], {}, False) and not (isinstance(item, str) and _is_success(item))
            for item in value.values()
        )
    return bool(value)


def _is_failure(document: Mapping[str, Any]) -> bool:
    """Whether an object without choices reports a failure by a code and words of its own."""
    if document.get("success") is False or "error" in (document.get("object"), document.get("type")):
        return True
    message = next((document[name] for name in MESSAGE_MEMBERS if document.get(name)), None)
    if not isinstance(message, str | list):
        return any(_status_of_number(document.get(name), {}) for name in CODE_MEMBERS)
    codes = [document[name] for name in CODE_MEMBERS if name in document]
    return any(not _is_success(code) for code in codes) or (not codes and "detail" in document)


def _read(value: Any, holder: Mapping[str, Any]) -> ErrorFields:
    if isinstance(value, list):
        value = value[0]
    if isinstance(value, Mapping):
        return _fields(value)
    if isinstance(value, str):
        return _fields({**holder, "message": value, **dict.fromkeys(ERROR_MEMBERS)})
    rest = _fields({name: item for name, item in holder.items() if name not in ("choices", "usage")})
    return rest if rest.message or value is True else _fields({"code": value})


def _fields(error: Mapping[str, Any], numbers: Mapping[int, int] = _FOUR_DIGITS) -> ErrorFields:
    codes = [error[name] for name in CODE_MEMBERS if error.get(name) not in (None, "")]
    types = [error[name] for name in TYPE_MEMBERS if isinstance(error.get(name), str)]
    names = [item for item in codes if isinstance(item, str) and _integer(item) is None]
    code = (names or types or [""])[0][:100]
    message = next((_words(error[name]) for name in MESSAGE_MEMBERS if error.get(name)), "")
    status = next((known for item in codes if (known := _status_of_number(item, numbers))), 0)
    status = status or next((known for name in (*names, *types) if (known := _status_of_name(name))), 0)
    is_moderated = _is_moderated(error, {code.lower(), *(kind.lower() for kind in types)}, message, status)
    if is_moderated and code.lower() not in MODERATION_CODES:
        code = "moderation"
    if not message:
        message = _words(error.get("type") or error.get("code") or error or "")
    return ErrorFields(code, message, status, is_moderated)


def _is_moderated(error: Mapping[str, Any], names: set[str], message: str, status: int) -> bool:
    if not MODERATION_CODES.isdisjoint(names) or status == 451:
        return True
    for inner in ("metadata", "innererror", "inner_error"):
        detail = error.get(inner)
        if isinstance(detail, Mapping):
            if detail.get("flagged_input") or detail.get("content_filter_result"):
                return True
            if str(detail.get("code") or "").lower() in MODERATION_CODES:
                return True
    if status not in _STATUSES_OF_PROMPTS:
        return False
    return _MODERATION_WORDS.search(message) is not None and _ACCOUNT_WORDS.search(message) is None


def _integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return int(value)
    if isinstance(value, str) and value.isascii() and value.lstrip("-").isdigit() and len(value) < 10:
        return int(value)
    return None


def _status_of_number(value: Any, numbers: Mapping[int, int]) -> int:
    number = _integer(value)
    if number is None:
        return 0
    return number if 400 <= number <= 599 else numbers.get(number, 0)


def _status_of_name(name: str) -> int:
    if is_quota(name):
        return 402
    plain = _PUNCTUATION.sub("", name.lower())
    if plain.startswith("throttling"):
        return 429
    if plain in {"internalerrortimeout"}:
        return 504
    return _STATUS_OF_NAME.get(plain, 0)


def _words(value: Any) -> str:
    """What a value says, in at most `MAX_WORDS` characters."""
    if isinstance(value, str):
        return value[:MAX_WORDS]
    if isinstance(value, list) and value:
        return _words(value[0])
    if isinstance(value, Mapping):
        for name in MESSAGE_MEMBERS:
            if isinstance(value.get(name), str) and value[name]:
                return str(value[name])[:MAX_WORDS]
    return "" if value is None else str(value)[:MAX_WORDS]

"""Every status gives the right error class, a wait within bounds and a message that is safe to print."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.error_body import MAX_RETRY_AFTER_S, classify, excerpt, retry_after_s
from harvester.errors import (
    PromptRejected,
    RateLimited,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)


def error(code: str | None = None, kind: str = "", message: str = "No.") -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "code": code}})


@pytest.mark.parametrize(
    ("status", "code", "leaf"),
    [
        (301, None, TeacherRefused),
        (307, None, TeacherRefused),
        (400, "context_length_exceeded", PromptRejected),
        (400, "model_not_found", TeacherRefused),
        (401, "invalid_api_key", TeacherRefused),
        (402, None, TeacherRefused),
        (403, None, TeacherRefused),
        (403, "content_policy_violation", PromptRejected),
        (404, "model_not_found", TeacherRefused),
        (408, None, TeacherUnavailable),
        (409, None, TeacherUnavailable),
        (413, None, PromptRejected),
        (422, None, PromptRejected),
        (429, "rate_limit_exceeded", RateLimited),
        (429, "slow_down", RateLimited),
        (429, "insufficient_quota", TeacherRefused),
        (429, "credit_balance_exhausted", TeacherRefused),
        (429, "organization_spend_limit_exceeded", TeacherRefused),
        (429, "project_usage_limit_exceeded", TeacherRefused),
        (500, None, TeacherUnavailable),
        (502, None, TeacherUnavailable),
        (503, None, TeacherUnavailable),
        (520, None, TeacherUnavailable),
        (529, None, RateLimited),
    ],
)
def test_status_and_code_decide(status: int, code: str | None, leaf: type[TeacherError]) -> None:
    classified = classify(status, {}, error(code), place="host/v1")
    assert type(classified) is leaf
    assert classified.status == status
    assert str(status) in str(classified)
    # A gateway that lost touch with the teacher may have left an answer, and its price, behind it.
    assert classified.maybe_billed is (status in {502, 520})


def test_503_with_a_wait_is_a_rate_limit() -> None:
    classified = classify(503, {"retry-after": "2"}, b"")
    assert isinstance(classified, RateLimited)
    assert classified.retry_after_s == 2.0


def test_redirect_names_the_host_and_not_the_path() -> None:
    classified = classify(307, {"location": "https://elsewhere.example/steal?key=1"}, b"")
    assert "elsewhere.example" in classified.message
    assert "steal" not in classified.message


@pytest.mark.parametrize("location", ["http://[", "http://a]b/", "", "\x00"])
def test_a_redirect_to_no_address_is_an_error_too(location: str) -> None:
    assert "an unnamed host" in classify(302, {"location": location}, b"").message


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e99"}, MAX_RETRY_AFTER_S),
        ({"retry-after": "inf"}, MAX_RETRY_AFTER_S),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:27:00 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "garbage"}, None),
        # As some servers write it.
        ({"retry-after": "1792567710", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "1792567710000", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "2026-10-21T07:28:30Z", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"retry-after": "1792567710"}, None),
        ({"retry-after": "20s"}, 20.0),
        ({"retry-after": "1m30s"}, 90.0),
        ({"retry-after": "30, 30"}, 30.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers) == seconds


@given(st.text(), st.text())
def test_no_header_crashes_or_waits_for_ever(value: str, date: str) -> None:
    classified = retry_after_s({"retry-after": value, "date": date})
    assert classified is None or 0 <= classified <= MAX_RETRY_AFTER_S


def test_keys_and_control_characters_are_never_shown() -> None:
    message = "Incorrect API key provided: sk-CANARY-1234567890. \x1b[31mred\x1b]0;title\x07 mine-is-odd"
    classified = classify(401, {}, error("invalid_api_key", message=message), secret="mine-is-odd")
    assert "CANARY" not in str(classified)
    assert "mine-is-odd" not in str(classified)
    assert "\x1b" not in str(classified)
    assert "\x07" not in str(classified)


@given(st.text())
def test_an_excerpt_is_one_short_printable_line(text: str) -> None:
    shown = excerpt(text)
    assert shown.isprintable()
    assert len(shown) <= 200


@given(st.integers(100, 999).filter(lambda status: status != 200), st.binary(max_size=60))
def test_every_status_has_an_error_class(status: int, body: bytes) -> None:
    assert isinstance(classify(status, {}, body), TeacherError)

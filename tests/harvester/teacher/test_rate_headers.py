"""Limits that are not configured: read from headers in every form, or learned from refusals."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harvester.api.http_values import quota_number, reset_seconds
from harvester.config.teacher_section import LimitsSection
from harvester.teacher.limiter.limits import REQUESTS_PER_MINUTE, Charge
from harvester.teacher.limiter.rate_headers import parse_rate_headers
from harvester.teacher.limiter.rate_limiter import Limiter

DATE = "Tue, 24 Nov 2026 05:00:00 GMT"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360),
        ("12ms", 0.012),
        ("4m12.172s", 252.172),
        ("23h18m29.144s", 83909.144),
        ("1d", 86400),
        ("41", 41),
        ("1.5", 1.5),
        ("0", 0),
        ("1795496460", 60),
        ("1795496460000", 60),
        ("2026-11-24T05:01:00Z", 60),
        ("2026-11-24T04:00:00Z", 0),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("nan", None),
        ("1e999", None),
        ("5x", None),
        (None, None),
    ],
)
def test_a_reset_in_every_form(text: str | None, seconds: float | None) -> None:
    assert reset_seconds(text, DATE) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize(
    ("headers", "name", "rate", "remaining"),
    [
        (
            {
                "x-ratelimit-limit-requests": "600",
                "x-ratelimit-remaining-requests": "599",
                "x-ratelimit-reset-requests": "100ms",
            },
            "requests per minute",
            10,
            599,
        ),
        ({"anthropic-ratelimit-input-tokens-limit": "60000"}, "input tokens per minute", 1000, None),
        ({"anthropic-ratelimit-output-tokens-limit": "6000"}, "output tokens per minute", 100, None),
        ({"ratelimit-limit": "60", "ratelimit-remaining": "3"}, "requests per minute", 1, 3),
        ({"x-ratelimit-limit": "60;w=60"}, "requests per minute", 1, None),
        ({"x-ratelimit-limit-tokens_usage_based": "6,000"}, "tokens per minute", 100, None),
        ({"x-ratelimit-limit-requests-day": "86400"}, "requests per day", 1, None),
        ({"x-ratelimit-limit-tokens-minute": "600"}, "tokens per minute", 10, None),
        (
            {"x-ratelimit-limit-requests": "86400", "x-ratelimit-reset-requests": "23h1m"},
            "requests per day",
            1,
            None,
        ),
    ],
)
def test_a_limit_in_every_form(
    headers: dict[str, str], name: str, rate: float, remaining: float | None
) -> None:
    (header,) = parse_rate_headers(headers)
    assert (header.key.label, header.rate, header.remaining) == (name, pytest.approx(rate), remaining)


NAMES = (
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "date",
    "ratelimit-limit",
    "ratelimit-remaining",
    "ratelimit-reset",
)
NUMBERS = st.sampled_from(
    ["0", "5e-324", "1e-300", "1e-9", "0.5", "1", "60", "1e18", "1e200", "1.7e308", "1h"]
)


@given(st.dictionaries(st.sampled_from(NAMES), NUMBERS | st.text(max_size=30)))
@example({"x-ratelimit-limit-requests": "5e-324"})
@example(
    {
        "ratelimit-limit": "1e308",
        "ratelimit-remaining": "1",
        "ratelimit-reset": "100",
    }
)
@example(
    {
        "ratelimit-limit": "1e308",
        "ratelimit-remaining": "1e307",
        "ratelimit-reset": "5e-324",
    }
)
def test_no_header_crashes_or_gives_an_impossible_rate(headers: dict[str, str]) -> None:
    for header in parse_rate_headers(headers):
        assert 0 < header.rate < float("inf")
        assert header.reset_s is None or header.reset_s >= 0
    limiter = Limiter(LimitsSection(), 0.0)
    limiter.learn_from_headers(headers, 1.0)
    limiter.enter(Charge(1, 1), 1.0)
    assert 0 <= limiter.wait_s(Charge(1, 1), 1.0) < float("inf")


@given(st.text(max_size=12))
def test_a_number_is_finite_and_not_negative(text: str) -> None:
    value = quota_number(text)
    assert value is None or 0 <= value < float("inf")


def test_headers_lower_and_raise_a_rate_but_never_above_the_configured() -> None:
    limiter = Limiter(LimitsSection(requests_per_minute=6000), 0.0)
    for limit, expected in (("600", 10), ("1200", 20), ("60000", 100)):
        limiter.learn_from_headers({"x-ratelimit-limit-requests": limit}, 1.0)
        assert limiter.buckets[REQUESTS_PER_MINUTE].rate == expected


def test_a_daily_allowance_that_is_used_up_pauses_until_its_reset() -> None:
    limiter = Limiter(LimitsSection(), 0.0)
    headers = {"x-ratelimit-limit-requests-day": "1000", "x-ratelimit-reset-requests-day": "5h"}
    limiter.learn_from_headers({**headers, "x-ratelimit-remaining-requests-day": "12"}, 0.0)
    assert limiter.wait_s(Charge(1, 1), 0.0) == 0
    limiter.learn_from_headers({**headers, "x-ratelimit-remaining-requests-day": "0"}, 0.0)
    assert limiter.wait_s(Charge(1, 1), 0.0) == 18_000
    assert limiter.waiting_reason(Charge(1, 1), 0.0) == "requests per day, 18000 s"


def test_what_is_reserved_follows_what_answers_use() -> None:
    limiter = Limiter(LimitsSection(tokens_per_minute=60_000), 0.0)
    sent = Charge(10, 4096)
    assert limiter.expected_charge(sent) == sent
    for n in range(400):
        limiter.settle(sent, Charge(10, 20 + n % 20), float(n))
    assert 25 <= limiter.expected_charge(sent).output_tokens <= 60

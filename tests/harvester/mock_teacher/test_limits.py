"""Test the mock teacher's limits: what is admitted, and what a refusal looks like."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import HarvesterError
from harvester.mock_teacher.limits import ArrivalSchedule, duration
from tests.raw_client import Caller, once, raw
from tests.waiting import until

amounts = st.floats(0.5, 500)
steps = st.lists(st.tuples(st.floats(0, 30), amounts), max_size=60)
rates = st.floats(1, 10_000)
bursts = st.floats(0.1, 60)


@given(per_minute=rates, burst_s=bursts, steps=steps)
def test_no_span_admits_more_than_burst_plus_rate_times_span(per_minute, burst_s, steps):
    schedule = ArrivalSchedule(per_minute, burst_s, now=0.0)
    now, taken = 0.0, []
    for wait_s, amount in steps:
        now += wait_s
        if schedule.wait_s(amount, now) == 0:
            schedule.take(amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[first : last + 1]
            burst = max(1.0, burst_s * per_minute / 60, *(amount for _, amount in span))
            refill = (span[-1][0] - span[0][0]) * per_minute / 60
            assert sum(amount for _, amount in span) <= (burst + refill) * (1 + 1e-6) + 1e-6


@given(per_minute=rates, burst_s=bursts, steps=steps)
def test_a_caller_that_waits_as_asked_is_admitted(per_minute, burst_s, steps):
    schedule = ArrivalSchedule(per_minute, burst_s, now=0.0)
    now = 0.0
    for wait_s, amount in steps:
        now += wait_s
        now += schedule.wait_s(amount, now)
        assert schedule.wait_s(amount, now) == 0
        schedule.take(amount, now)
        assert schedule.remaining(now) <= max(1.0, burst_s * per_minute / 60)


@pytest.mark.parametrize(("per_minute", "burst_s", "span_s"), [(600, 1, 30), (12_000, 0.25, 3), (60, 10, 60)])
def test_a_greedy_caller_gets_the_burst_and_then_the_rate(per_minute, burst_s, span_s):
    schedule = ArrivalSchedule(per_minute, burst_s, now=0.0)
    admitted, tick_s = 0, 60 / per_minute / 4
    for tick in range(int(span_s / tick_s) + 1):
        while schedule.wait_s(1, tick * tick_s) == 0:
            schedule.take(1, tick * tick_s)
            admitted += 1
    assert admitted == pytest.approx(per_minute / 60 * (burst_s + span_s), abs=1)


@given(st.floats(0, 10_000), st.floats(-100, 0))
def test_a_clock_that_steps_back_gives_nothing(start, step):
    schedule = ArrivalSchedule(60, 10, now=start)
    schedule.take(10, start)
    assert schedule.wait_s(1, start + step) == pytest.approx(1)


def test_a_change_keeps_what_is_owed_and_never_gives_a_burst():
    schedule = ArrivalSchedule(60, 10, now=0.0)
    schedule.take(25, 0.0)
    schedule.change(6000, 10, now=0.0)
    assert schedule.remaining(0.0) == pytest.approx(-15)
    schedule.change(6, 10, now=100.0)
    assert schedule.remaining(100.0) == schedule.burst == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.0115, "12ms"), (1.2, "1.2s"), (59.0, "59s"), (360.0, "6m0s"), (3660.5, "1h1m0.5s")],
)
def test_durations_have_the_format_of_openai_headers(seconds, text):
    assert duration(seconds) == text


def test_a_request_over_the_rate_is_refused_with_headers_and_wait(mock_teacher):
    mock = mock_teacher(rpm=60, tpm=100_000)
    with Caller(mock.base_url) as caller:
        first = caller.ask("What is 1 + 2?")
        second = caller.ask("What is 1 + 2?")
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert first.headers["x-ratelimit-limit-tokens"] == "100000"
    assert second.status == 429
    error = second.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "requests")
    assert "Please try again in" in error["message"]
    assert second.headers["retry-after"] == "1"
    assert 0 < int(second.headers["retry-after-ms"]) <= 1000
    assert mock.totals()["requests"] == 1
    assert mock.state()["statuses"] == {"200": 1, "429": 1}


def test_the_token_limit_names_itself(mock_teacher):
    mock = mock_teacher(tpm=600)
    with Caller(mock.base_url) as caller:
        assert caller.ask("What is 1 + 2?").status == 200
        refused = caller.ask("What is 1 + 2?")
    assert refused.status == 429
    assert refused.json()["error"]["type"] == "tokens"


def test_a_request_larger_than_a_minute_of_tokens_never_passes(mock_teacher):
    mock = mock_teacher(tpm=20)
    refused = once(mock.base_url, "What is 1 + 2? " + "word " * 50)
    assert refused.status == 429
    assert refused.json()["error"]["message"].startswith("Request too large")
    assert "retry-after" not in refused.headers


def test_counting_max_tokens_up_front_refuses_what_actual_use_would_not(mock_teacher):
    actual = mock_teacher(tpm=1200)
    upfront = mock_teacher(tpm=1200, tpm_counts="max")
    assert once(actual.base_url, max_tokens=2000).status == 200
    assert once(upfront.base_url, max_tokens=2000).status == 429


def test_hidden_limits_leave_no_trace(mock_teacher):
    mock = mock_teacher(rpm=60, tpm=1000, hide_limits=True)
    with Caller(mock.base_url) as caller:
        replies = [caller.ask("What is 1 + 2?") for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 429]
    for reply in replies:
        assert not [name for name in reply.headers if "ratelimit" in name or "retry" in name]
    assert "try again" not in replies[1].json()["error"]["message"]


def test_limits_change_while_it_runs(mock_teacher):
    mock = mock_teacher(rpm=1)
    with Caller(mock.base_url) as caller:
        assert [caller.ask("What is 1 + 2?").status for _ in range(2)] == [200, 429]
        assert mock.set_limits(rpm=None)["rpm"] is None
        assert {caller.ask("What is 1 + 2?").status for _ in range(20)} == {200}
        mock.set_limits(rpm=1, hide=True)
        replies = [caller.ask("What is 1 + 2?") for _ in range(3)]
    assert [reply.status for reply in replies] == [200, 429, 429]
    assert "retry-after" not in replies[1].headers


@pytest.mark.parametrize("change", [{"rpm": -1}, {"rpm": "many"}, {"requests": 5}])
def test_a_wrong_change_changes_nothing(mock_teacher, change):
    mock = mock_teacher(rpm=600)
    with pytest.raises(HarvesterError, match=r"limit|rpm"):
        mock.set_limits(**change)
    assert mock.state()["limits"]["rpm"] == 600


@pytest.mark.parametrize(("status", "code"), [(503, "server_overloaded"), (429, "rate_limit_exceeded")])
def test_more_requests_at_once_than_the_ceiling_are_refused(mock_teacher, status, code):
    mock = mock_teacher(
        max_concurrency=1,
        concurrency_status=status,
        faults=[{"action": "silence", "nth": 1, "billed": False}],
    )
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(raw, mock.base_url, patience_s=60)
        until(lambda: mock.fired()["1:silence"])
        refused = once(mock.base_url)
        assert (refused.status, refused.json()["error"]["code"]) == (status, code)
        mock.stop()
        assert waiting.result(timeout=240).data == b""

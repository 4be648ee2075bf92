"""Test the rules of the limiter; time is passed in as a number."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.config.teacher_section import LimitsSection
from harvester.teacher.limiter.bucket import Bucket
from harvester.teacher.limiter.limits import (
    INPUT_TOKENS_PER_MINUTE,
    OUTPUT_TOKENS_PER_MINUTE,
    REQUESTS_PER_MINUTE,
    TOKENS_PER_MINUTE,
    Charge,
    LimitKey,
    Quantity,
)
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.limiter.sends import Entry
from harvester.teacher.limiter.window import Window

_ARRIVALS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5000)), min_size=1, max_size=60)


@settings(max_examples=200)
@given(rate=st.floats(0.5, 500), arrivals=_ARRIVALS)
def test_no_time_span_admits_more_than_burst_plus_rate_times_span(
    rate: float, arrivals: list[tuple[float, int]]
) -> None:
    bucket = Bucket(rate, 0.0)
    now = 0.0
    admitted: list[tuple[float, int]] = []
    for gap, amount in arrivals:
        now += gap
        now += bucket.wait_s(amount, now)  # first come, first served
        assert bucket.wait_s(amount, now) <= 1e-6
        bucket.take(amount)
        admitted.append((now, amount))
    burst = max(bucket.capacity, *(amount for _, amount in admitted))
    for first in range(len(admitted)):
        total = 0
        for last in range(first, len(admitted)):
            total += admitted[last][1]
            span = admitted[last][0] - admitted[first][0]
            assert total <= burst + rate * span + 1e-6 * total


def test_an_oversized_request_goes_when_the_bucket_is_full_and_leaves_a_debt() -> None:
    bucket = Bucket(100.0, 0.0)
    wait_s = bucket.wait_s(10_000, 0.0)
    assert wait_s == pytest.approx((bucket.capacity - 1) / 100)
    bucket.take(10_000)
    assert bucket.wait_s(1, wait_s) == pytest.approx((10_000 + 1 - 1) / 100, rel=0.01)


def test_a_cold_start_earns_its_burst() -> None:
    bucket = Bucket(200.0, 0.0)
    assert bucket.wait_s(1, 0.0) == 0
    bucket.take(1)
    assert bucket.wait_s(1, 0.0) > 0


def test_a_clock_that_steps_back_or_stands_still_gives_nothing() -> None:
    bucket = Bucket(10.0, 100.0)
    bucket.take(1)
    assert bucket.wait_s(1, 0.0) == pytest.approx(0.1)
    assert bucket.wait_s(1, 100.0) == pytest.approx(0.1)


def test_a_long_pause_saves_up_no_more_than_the_burst() -> None:
    bucket = Bucket(10.0, 0.0)
    bucket.refill(36_000.0)
    assert bucket.level == bucket.capacity


_STEPS = st.sampled_from(["enter", "answer", "cut", "leave", "timeout"])


@given(st.lists(_STEPS, max_size=200), st.sampled_from([1, 3, 64, 1000]))
def test_the_window_stays_within_one_and_its_ceiling(steps: list[str], ceiling: int) -> None:
    window = Window(ceiling, deadline_s=60.0)
    for now, step in enumerate(steps):
        entry = Entry(now - 0.5, max(1, window.in_flight))
        if step == "enter" and not window.is_full:
            window.enter()
            window.departed()
        elif step == "answer" and window.in_flight:
            window.answered(entry, now, 10)
            window.leave()
        elif step == "leave" and window.in_flight:
            window.leave()
        elif step == "cut":
            window.cut(entry, float(now), window.in_flight)
        elif step == "timeout":
            window.timed_out(entry)
        assert 1 <= window.size <= ceiling


def test_five_hundred_refusals_of_one_round_trip_halve_the_window_at_most() -> None:
    window = Window(64)
    window.size, window.in_flight = 64.0, 64
    for _ in range(500):
        window.cut(Entry(1.0, 64), now=2.0, in_air=window.in_flight)
        window.in_flight = max(0, window.in_flight - 1)
    assert window.size == 32
    window.in_flight = 0
    assert window.cut(Entry(2.5, 32), now=3.0, in_air=window.in_flight)
    assert window.size == 16


def test_a_cut_leaves_what_is_in_flight_beside_the_refused_request() -> None:
    window = Window(64)
    window.size, window.in_flight = 64.0, 61
    assert window.cut(Entry(1.0, 61), now=2.0, in_air=window.in_flight)
    assert window.size == 60


def test_growth_needs_a_used_window_and_a_send_after_the_cut() -> None:
    window = Window(64)
    window.in_flight = 3
    window.answered(Entry(1.0, 3), 1.5, 10)
    assert window.size == 16
    window.in_flight = 16
    window.answered(Entry(1.0, 16), 1.5, 10)
    assert window.size > 16
    window.cut(Entry(2.0, 16), now=3.0, in_air=window.in_flight)
    before = window.size
    window.in_flight = int(before)
    window.answered(Entry(2.5, 16), 3.5, 10)
    assert window.size == before


def test_reserve_settle_refund_and_the_reason() -> None:
    limits = LimitsSection(requests_per_minute=6000, tokens_per_minute=6000)
    limiter = Limiter(limits, 0.0)
    charge = Charge(20, 500)
    assert limiter.wait_s(charge, 10.0) == 0
    entry = limiter.enter(charge, 10.0)
    assert limiter.wait_s(charge, 10.0) == pytest.approx(520 / 100)
    assert limiter.waiting_reason(charge, 10.0) == "tokens per minute, 5 s"
    limiter.settle(charge, Charge(20, 5), 10.0)
    assert limiter.wait_s(Charge(10, 15), 10.0) == pytest.approx(0.25, abs=0.05)
    limiter.refund(Charge(20, 5), 10.0)
    assert limiter.wait_s(Charge(10, 10), 10.0) == 0
    limiter.leave(entry)
    assert limiter.window.in_flight == 0


@pytest.mark.parametrize(
    ("limit", "per_minute", "wait_s"),
    [
        (REQUESTS_PER_MINUTE, 60, 1.0),
        (INPUT_TOKENS_PER_MINUTE, 600, 30 / 10),
        (OUTPUT_TOKENS_PER_MINUTE, 600, 70 / 10),
        (TOKENS_PER_MINUTE, 600, 100 / 10),
    ],
)
def test_each_limit_counts_its_own_part_of_a_request(
    limit: LimitKey, per_minute: float, wait_s: float
) -> None:
    limiter = Limiter(LimitsSection.model_validate({limit.label.replace(" ", "_"): per_minute}), 0.0)
    charge = Charge(input_tokens=30, output_tokens=70)
    entry = limiter.enter(charge, 0.0)
    limiter.leave(entry)
    # From a level of one request's worth down into debt, and up again until one unit is there.
    bucket = limiter.buckets[limit]
    assert bucket.wait_s(1, 0.0) == pytest.approx(wait_s, rel=0.05)
    assert limiter.waiting_reason(Charge(1, 1), 0.0).startswith(limit.label)


_CHARGES = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 400), st.sampled_from(["answer", "refund", "lost"])),
    max_size=40,
)


@given(_CHARGES)
def test_settled_and_refunded_charges_leave_what_was_used(
    steps: list[tuple[int, int, str]],
) -> None:
    limiter = Limiter(LimitsSection(tokens_per_minute=60_000), 0.0)
    bucket = limiter.buckets[TOKENS_PER_MINUTE]
    bucket.capacity, bucket.level = 1e9, 0.0
    used = 0
    for reserved, actual, ending in steps:
        charge = Charge(0, reserved)
        entry = limiter.enter(charge, 0.0)
        if ending == "answer":
            limiter.settle(charge, Charge(0, actual), 0.0)
            used += actual
        elif ending == "refund":
            limiter.refund(charge, 0.0)
        else:
            used += reserved
        limiter.leave(entry)
    assert bucket.level == pytest.approx(-used)
    assert limiter.window.in_flight == 0


def test_a_pause_stops_admission_and_leaves_the_window_alone() -> None:
    limiter = Limiter(LimitsSection(), 0.0)
    limiter.pause(41.0, 0.0, "the teacher's Retry-After")
    limiter.pause(3.0, 0.0, "shorter")
    assert limiter.wait_s(Charge(1, 1), 0.0) == 41.0
    assert limiter.waiting_reason(Charge(1, 1), 0.0) == "the teacher's Retry-After, 41 s"
    assert limiter.window.size == 16
    assert limiter.wait_s(Charge(1, 1), 41.0) == 0


def test_a_full_window_waits_for_a_release() -> None:
    limiter = Limiter(LimitsSection(max_concurrency=1), 0.0)
    entry = limiter.enter(Charge(1, 1), 0.0)
    assert limiter.wait_s(Charge(1, 1), 0.0) == math.inf
    assert limiter.waiting_reason(Charge(1, 1), 0.0) == "window of 1 in flight"
    limiter.leave(entry)
    assert limiter.wait_s(Charge(1, 1), 0.0) == 0


def test_a_request_for_several_answers_is_one_request_with_the_tokens_of_all() -> None:
    limiter = Limiter(LimitsSection(), 0.0)
    several = Charge(10, 800, answers=8)
    assert [quantity.amount(several) for quantity in (Quantity.REQUESTS, Quantity.OUTPUT_TOKENS)] == [1, 800]
    assert limiter.expected_charge(several) == several
    limiter.settle(several, Charge(10, 160, answers=8), 1.0)
    assert limiter.output_estimate.tokens == pytest.approx(20, abs=2)  # of one answer
    assert limiter.expected_charge(several).output_tokens == pytest.approx(160, abs=16)
    assert limiter.expected_charge(Charge(10, 100)).output_tokens == pytest.approx(20, abs=2)

"""Test the time estimate: exact for an even run, wide where little is known; pauses do not count as work."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.observe.eta import UNKNOWN_ERROR, Ahead, Forecast, Limits, Point, Work


def steady(
    seconds: int, *, per_s: int = 10, tokens: int = 30, begin: int = 0, hold_s: float = 0.0
) -> Forecast:
    """A run of even answers, noted every two seconds; the time on hold came before."""
    forecast = Forecast()
    for second in range(begin, begin + seconds + 1, 2):
        count = (second - begin) * per_s
        forecast.note(
            Point(
                second + hold_s,
                float(second),
                sent=count,
                answers=count,
                input_tokens=10 * count,
                output_tokens=(tokens - 10) * count,
                cost_microusd=5 * count,
            )
        )
    return forecast


def ahead(forecast: Forecast, work: Work) -> Ahead:
    estimate = forecast.ahead(work)
    assert estimate is not None
    return estimate


@pytest.mark.parametrize("seconds", [20, 120, 900])
def test_an_even_run_is_estimated_exactly_with_a_narrow_range(seconds: int) -> None:
    estimate = ahead(steady(seconds), Work(rows=1000, input_tokens=10_000, guessed_input=10))
    assert estimate.tokens.likely == pytest.approx(30_000)
    assert estimate.seconds.likely == pytest.approx(100)
    assert estimate.seconds.low == pytest.approx(98)
    assert estimate.seconds.high == pytest.approx(102)
    assert estimate.cost_microusd.likely == pytest.approx(5 * (seconds * 10 + 1000))


def test_nothing_is_estimated_before_the_first_answer_and_little_at_first() -> None:
    assert Forecast().ahead(Work(1, 1, 1)) is None
    waiting = Forecast()
    waiting.note(Point(0.0, 0.0))
    waiting.note(Point(4.0, 4.0, sent=8))
    assert waiting.ahead(Work(1, 1, 1)) is None
    early = ahead(steady(4), Work(100, 1000, 10))
    assert early.seconds.low == pytest.approx((1 - UNKNOWN_ERROR) * early.seconds.likely)


def test_estimates_of_prompts_are_corrected_by_what_the_teacher_counts() -> None:
    # Guessed 20 tokens a prompt, counted 10: the 200,000 guessed ones to come are 100,000.
    estimate = ahead(steady(60), Work(rows=10_000, input_tokens=200_000, guessed_input=20))
    assert estimate.tokens.likely == pytest.approx(100_000 + 200_000)


def test_time_on_hold_lowers_the_shown_rate_but_not_the_estimated_work() -> None:
    forecast = steady(60)
    last = Point(
        660.0, 60.0, sent=600, answers=600, input_tokens=6000, output_tokens=12_000, cost_microusd=3000
    )
    forecast.note(last)  # ten minutes of pause
    assert forecast.per_minute("sent") == 0.0
    assert ahead(forecast, Work(1000, 10_000, 10)).seconds.likely == pytest.approx(100)


def test_a_limit_that_was_lowered_a_moment_ago_bounds_the_time_left() -> None:
    work = Work(rows=1000, input_tokens=10_000, guessed_input=10)
    free = steady(60).ahead(work)
    assert free is not None
    assert steady(60).ahead(work, Limits(60_000, 6_000_000)) == free
    slow = steady(60).ahead(work, Limits(requests_per_minute=30))
    assert slow is not None
    assert (slow.seconds.low, slow.seconds.high) == (2000, 2000)
    few = steady(60).ahead(work, Limits(tokens_per_minute=3000))
    assert few is not None
    assert few.seconds.low == pytest.approx(free.tokens.low / 50)
    assert few.seconds.likely == pytest.approx(600)
    assert (slow.tokens, few.cost_microusd) == (free.tokens, free.cost_microusd)


def test_requests_for_several_answers_need_fewer_requests_for_the_rows_left() -> None:
    forecast = Forecast()
    for second in range(0, 62, 2):
        forecast.note(Point(second, second, 10 * second, 0, 40 * second, 400 * second, 400 * second))
    estimate = forecast.ahead(Work(1000, 10_000, 10), Limits(requests_per_minute=30))
    assert estimate is not None
    assert estimate.seconds.likely == pytest.approx(500)


def test_a_rate_that_halved_widens_the_range_to_both_speeds() -> None:
    forecast, count = Forecast(), 0
    for second in range(0, 1801, 2):
        count += 20 if second <= 900 else 10
        forecast.note(Point(second, second, answers=count, input_tokens=10 * count, output_tokens=20 * count))
    estimate = ahead(forecast, Work(1000, 10_000, 10))
    assert estimate.seconds.low <= 30_000 / 225  # the whole run's speed: 7.5 answers a second
    assert estimate.seconds.high >= 30_000 / 150 * 0.99  # the last minute's: 5 a second
    assert estimate.seconds.low < estimate.seconds.likely <= estimate.seconds.high


def test_the_range_holds_the_truth_for_answers_of_very_unequal_length() -> None:
    chance = random.Random(7)
    hits = 0
    for _ in range(40):
        lengths = [int(chance.lognormvariate(4, 1)) + 1 for _ in range(4000)]
        forecast, done, tokens = Forecast(), 0, 0
        for second in range(0, 200, 2):  # 500 tokens a second, whatever the rows
            while done < 2000 and tokens + lengths[done] <= 500 * second:
                tokens += lengths[done]
                done += 1
            forecast.note(Point(second, second, answers=done, output_tokens=tokens))
        left = sum(lengths[done:])
        estimate = ahead(forecast, Work(4000 - done, 0, 0))
        hits += estimate.seconds.low <= left / 500 <= estimate.seconds.high
    assert hits >= 32  # of 40; two standard errors would be 38


@given(st.lists(st.tuples(st.floats(0.01, 30), st.integers(0, 50), st.booleans()), min_size=2, max_size=400))
def test_a_range_is_a_range_whatever_comes(steps: list[tuple[float, int, bool]]) -> None:
    forecast, now, active, count = Forecast(), 0.0, 0.0, 0
    for passed, answers, held in steps:
        now += passed
        active += 0.0 if held else passed
        count += answers
        forecast.note(Point(now, active, count, 0, count, 7 * count, 13 * count, 3 * count))
        assert forecast.per_minute("answers") >= 0
        assert 0 <= forecast.refused_share() <= 1
    estimate = forecast.ahead(Work(50, 500, 10))
    if estimate is not None:
        for span in (estimate.tokens, estimate.seconds, estimate.cost_microusd):
            assert 0 <= span.low <= span.likely <= span.high

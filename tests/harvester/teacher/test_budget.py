"""Spent plus reserved never exceeds a ceiling."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config.budget_spans import BudgetSpan
from harvester.teacher.budget import Budget, Ceiling, Reservation, why_exhausted

_STEPS = st.lists(
    st.tuples(
        st.integers(0, 50), st.integers(0, 50), st.floats(0, 1), st.sampled_from(["settle", "refund", "hold"])
    ),
    max_size=60,
)


def of_run(tokens: int | None = None, microusd: int | None = None) -> Ceiling:
    return Ceiling(BudgetSpan.RUN, tokens, microusd)


@given(_STEPS, st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.integers(0, 300))
def test_billed_never_passes_the_ceiling_of_any_span(
    steps: list[tuple[int, int, float, str]], tokens: int, microusd: int, of_day: int, spent_today: int
) -> None:
    day = Ceiling(BudgetSpan.DAY, of_day, spent=(spent_today, 0), ends_at=1e9)
    budget = Budget(of_run(tokens, microusd), day)
    for want_tokens, want_usd, share, ending in steps:
        wanted = (want_tokens, want_usd)
        if budget.reserve(*wanted) is Reservation.GRANTED:
            if ending == "settle":
                budget.settle(wanted, (int(want_tokens * share), int(want_usd * share)))
            elif ending == "refund":
                budget.refund(wanted)
        run = budget.ceilings[BudgetSpan.RUN]
        assert run.spent[0] + budget.reserved[0] <= tokens
        assert run.spent[1] + budget.reserved[1] <= microusd
        assert day.spent[0] + budget.reserved[0] <= max(of_day, spent_today)


def test_a_reservation_is_granted_later_or_never() -> None:
    budget = Budget(of_run(tokens=100))
    assert budget.reserve(60, 0) is Reservation.GRANTED
    assert budget.reserve(60, 0) is Reservation.LATER
    budget.settle((60, 0), (10, 0))
    assert budget.reserve(60, 0) is Reservation.GRANTED
    budget.settle((60, 0), (60, 0))
    assert budget.reserve(60, 0) is Reservation.NEVER


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), min_size=1, max_size=30), st.integers(50, 900)
)
def test_an_overshoot_is_reserved_by_every_other_answer(bills: list[tuple[int, int]], tokens: int) -> None:
    """One answer at a time: a ceiling is exceeded by no more than the first time that it goes further."""
    budget, most = Budget(of_run(tokens)), 0
    run = budget.ceilings[BudgetSpan.RUN]
    for answers, beyond in bills:
        base = (10 * answers, 0)
        if budget.reserve(*base, answers) is not Reservation.GRANTED:
            assert run.spent[0] + (10 + most) * answers > tokens
            continue
        billed = ((10 + beyond) * answers, 0)
        budget.learn(base, billed, answers)
        budget.settle(base, billed, answers)
        assert budget.reserved == (0, 0)
        assert run.spent[0] <= tokens + max(0, beyond - most) * answers
        most = max(most, beyond)
        assert budget.overshoot == (most, 0)


def test_what_is_in_flight_reserves_an_overshoot_too() -> None:
    budget = Budget(of_run(tokens=1000))
    for _ in range(3):
        assert budget.reserve(100, 0) is Reservation.GRANTED
    budget.learn((100, 0), (400, 0))
    budget.settle((100, 0), (400, 0))
    assert budget.reserved == (800, 0)
    assert budget.reserve(100, 0) is Reservation.LATER
    budget.refund((100, 0))
    assert budget.reserve(100, 0) is Reservation.LATER
    budget.refund((100, 0))
    assert budget.reserve(100, 0) is Reservation.GRANTED
    reason, remedy = why_exhausted(budget.ceilings[BudgetSpan.RUN], budget.most((500, 0)), budget.overshoot)
    assert "forgets" in remedy
    assert "300 tokens of it since an answer was billed so much beyond its max_tokens" in reason


def test_without_a_ceiling_everything_is_granted() -> None:
    assert Budget().reserve(10**12, 10**12) is Reservation.GRANTED


def test_a_new_day_starts_at_nothing_and_the_month_goes_on() -> None:
    evening = datetime(2026, 11, 28, 23, 0, tzinfo=UTC).timestamp()
    ceilings = [Ceiling(span, 100, ends_at=span.end(evening)) for span in (BudgetSpan.DAY, BudgetSpan.MONTH)]
    budget = Budget(*ceilings)
    assert budget.reserve(90, 0) is Reservation.GRANTED
    budget.settle((90, 0), (90, 0))
    budget.start_new_spans(evening + 3599)
    assert budget.exhausted((50, 0)) is ceilings[0]
    budget.start_new_spans(evening + 3600)
    assert budget.exhausted((50, 0)) is ceilings[1]
    budget.start_new_spans(evening + 3 * 86_400)  # the first of December
    assert budget.reserve(100, 0) is Reservation.GRANTED


def test_the_reason_names_span_amounts_and_reservation() -> None:
    ceiling = Ceiling(BudgetSpan.DAY, tokens=700, spent=(324, 0), ends_at=86_400.0)
    reason, remedy = why_exhausted(ceiling, (400, 0))
    assert all(text in reason for text in ("this day", "324", "700", "400", "376"))
    assert "[budget.day]" in remedy
    assert "1970-01-02 00:00 UTC" in remedy


@pytest.mark.parametrize(
    ("span", "start", "end"),
    [
        (BudgetSpan.DAY, datetime(2024, 2, 29, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)),
        (BudgetSpan.MONTH, datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)),
    ],
)
def test_days_and_months_are_those_of_utc(span: BudgetSpan, start: datetime, end: datetime) -> None:
    wall = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp()
    assert (span.start(wall), span.end(wall)) == (start.timestamp(), end.timestamp())

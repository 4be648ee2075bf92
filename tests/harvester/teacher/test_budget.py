"""Spent plus reserved never exceeds a ceiling."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harvester.teacher.budget import Budget, Reservation

_STEPS = st.lists(
    st.tuples(
        st.integers(0, 50), st.integers(0, 50), st.floats(0, 1), st.sampled_from(["settle", "refund", "hold"])
    ),
    max_size=60,
)


@given(_STEPS, st.integers(0, 200), st.integers(0, 200))
def test_billed_never_passes_the_ceiling(
    steps: list[tuple[int, int, float, str]], tokens: int, microusd: int
) -> None:
    budget = Budget(tokens=tokens, microusd=microusd)
    for want_tokens, want_usd, share, ending in steps:
        wanted = (want_tokens, want_usd)
        if budget.reserve(*wanted) is Reservation.GRANTED:
            if ending == "settle":
                budget.settle(wanted, (int(want_tokens * share), int(want_usd * share)))
            elif ending == "refund":
                budget.refund(wanted)
        assert budget.spent[0] + budget.reserved[0] <= tokens
        assert budget.spent[1] + budget.reserved[1] <= microusd


def test_a_reservation_is_granted_later_or_never() -> None:
    budget = Budget(tokens=100)
    assert budget.reserve(60, 0) is Reservation.GRANTED
    assert budget.reserve(60, 0) is Reservation.LATER
    budget.settle((60, 0), (10, 0))
    assert budget.reserve(60, 0) is Reservation.GRANTED
    budget.settle((60, 0), (60, 0))
    assert budget.reserve(60, 0) is Reservation.NEVER


def test_without_a_ceiling_everything_is_granted() -> None:
    assert Budget().reserve(10**12, 10**12) is Reservation.GRANTED

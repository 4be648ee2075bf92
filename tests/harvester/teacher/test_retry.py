"""Which errors are retried, how often, and how long the waits are."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    PromptRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.teacher.retry import (
    BROKEN_ANSWER_ATTEMPTS,
    BROKEN_ANSWER_RETRIES,
    BROKEN_ANSWER_RETRY_SHARE,
    LONGEST_CONNECT_WAIT_S,
    LONGEST_WAIT_S,
    MOST_SAVED_RETRIES,
    RetryBudget,
    RetryPolicy,
)


def play(policy: RetryPolicy, *errors: TeacherError) -> tuple[list[int], list[float], TeacherError | None]:
    """Send until it succeeds: attempt n fails with the nth error.

    Returns:
        The number each attempt had, the waits between them, and the error that ended it, if any.
    """
    numbers: list[int] = []
    waits: list[float] = []
    left = list(errors)

    async def send(number: int) -> None:
        numbers.append(number)
        if left:
            raise left.pop(0)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    try:
        asyncio.run(policy.run(send, sleep))
    except TeacherError as error:
        return numbers, waits, error
    return numbers, waits, None


def sent(leaf: type[TeacherError], **facts: float) -> TeacherError:
    """An error of an attempt that reached the teacher."""
    return leaf("x", maybe_billed=True, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("leaf", [AttemptTimeout, ConnectionBroken, TeacherUnavailable])
def test_transient_errors_are_retried_until_the_attempts_are_used_up(leaf: type[TeacherError]) -> None:
    errors = [sent(leaf) for _ in range(9)]
    numbers, waits, ended = play(RetryPolicy(max_attempts=5), *errors)
    assert numbers == [1, 2, 3, 4, 5]
    assert len(waits) == 4
    assert ended is errors[4]


@pytest.mark.parametrize("leaf", [PromptRejected, TeacherRefused])
def test_permanent_errors_are_never_retried(leaf: type[TeacherError]) -> None:
    error = leaf("x", status=400)
    assert play(RetryPolicy(), error) == ([1], [], error)


def test_one_row_does_not_wait_for_a_day() -> None:
    errors = [sent(TeacherUnavailable, retry_after_s=86_000.0) for _ in range(3)]
    numbers, waits, _ = play(RetryPolicy(), *errors)
    assert numbers == [1, 2, 3, 4]
    assert all(600 <= seconds <= 660 for seconds in waits)


def test_an_answer_that_is_broken_gets_three_attempts_in_all() -> None:
    numbers, _, ended = play(RetryPolicy(max_attempts=9), *[sent(BrokenAnswer) for _ in range(9)])
    assert numbers == list(range(1, BROKEN_ANSWER_ATTEMPTS + 1))
    assert isinstance(ended, BrokenAnswer)


def test_retries_after_broken_answers_are_a_small_share_of_the_rows() -> None:
    policy = RetryPolicy(max_attempts=9)
    counts = []
    for _ in range(200):
        policy.budget.first_attempt()
        counts.append(len(play(policy, *[sent(BrokenAnswer) for _ in range(9)])[0]))
    assert max(counts) == BROKEN_ANSWER_ATTEMPTS
    assert 0 < sum(counts) - 200 <= BROKEN_ANSWER_RETRIES + 200 * BROKEN_ANSWER_RETRY_SHARE


def test_other_errors_use_up_no_retry_of_broken_answers() -> None:
    policy = RetryPolicy()
    for _ in range(20):
        play(policy, sent(ConnectionBroken))
    assert play(policy, sent(BrokenAnswer))[0] == [1, 2]


def test_without_retry_billed_nothing_that_may_be_billed_is_sent_again() -> None:
    policy = RetryPolicy(retry_billed=False)
    assert play(policy, sent(ConnectionBroken))[0] == [1]
    assert play(policy, TeacherUnavailable("x", status=500))[0] == [1, 2]


def test_failed_connections_use_up_no_attempt_and_wait_at_most_a_second() -> None:
    lost = [TeacherUnavailable("can't connect") for _ in range(50)]
    numbers, waits, ended = play(RetryPolicy(max_attempts=2), *lost, sent(AttemptTimeout))
    assert numbers == [1] * 51 + [2]
    assert max(waits[:50]) <= LONGEST_CONNECT_WAIT_S
    assert ended is None


def test_full_jitter_fills_its_range_and_stops_at_the_cap() -> None:
    policy = RetryPolicy(max_attempts=10**9, chance=random.Random(1))
    first = [play(policy, sent(TeacherUnavailable))[1][0] for _ in range(300)]
    late = play(policy, *[sent(TeacherUnavailable) for _ in range(400)])[1][100:]
    assert 0 <= min(first) < 0.05
    assert 0.45 < max(first) <= 0.5
    assert min(late) < 5
    assert 55 < max(late) <= LONGEST_WAIT_S


def test_the_teachers_wait_is_a_floor() -> None:
    _, (wait_s,), _ = play(RetryPolicy(), sent(TeacherUnavailable, retry_after_s=120.0))
    assert 120.0 <= wait_s <= 120.5


def test_the_same_seed_gives_the_same_waits() -> None:
    errors = [sent(ConnectionBroken) for _ in range(3)]
    first, second = (play(RetryPolicy(chance=random.Random(7)), *errors)[1] for _ in range(2))
    assert first == second


@given(st.lists(st.tuples(st.sampled_from(["first", "retry"]), st.floats(0, 2)), max_size=200))
def test_retries_stay_within_the_budget(steps: list[tuple[str, float]]) -> None:
    """In any prefix: retries that need not wait <= 20 + first attempts / 10 + seconds passed."""
    budget, now, firsts, retries = RetryBudget(), 0.0, 0, 0
    for kind, gap_s in steps:
        now += gap_s
        if kind == "first":
            budget.first_attempt()
            firsts += 1
        elif budget.take(now) == 0:
            retries += 1
        assert retries <= MOST_SAVED_RETRIES + firsts / 10 + now + 1e-6

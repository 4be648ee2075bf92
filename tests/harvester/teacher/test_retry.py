"""Which errors retry, and for how long they wait."""

from __future__ import annotations

import random

import pytest

from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    PromptRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.teacher.retry import LONGEST_WAIT_S, Backoff


@pytest.mark.parametrize("leaf", [AttemptTimeout, ConnectionBroken, TeacherUnavailable])
def test_transient_errors_retry_until_the_attempts_are_used_up(leaf: type[TeacherError]) -> None:
    law = Backoff(max_attempts=5)
    waits = [law.wait_s(leaf("x"), attempts) for attempts in range(1, 6)]
    assert None not in waits[:4]
    assert waits[4] is None


@pytest.mark.parametrize("leaf", [PromptRejected, TeacherRefused])
def test_permanent_errors_never_retry(leaf: type[TeacherError]) -> None:
    assert Backoff().wait_s(leaf("x"), 1) is None


def test_a_paid_but_broken_answer_gets_two_further_tries() -> None:
    law = Backoff(max_attempts=9)
    assert law.wait_s(BrokenAnswer("x"), 2) is not None
    assert law.wait_s(BrokenAnswer("x"), 3) is None


def test_full_jitter_fills_its_range_and_stops_at_the_cap() -> None:
    law = Backoff(max_attempts=10**9, chance=random.Random(1))
    first = [law.wait_s(TeacherUnavailable("x"), 1) or 0.0 for _ in range(300)]
    late = [law.wait_s(TeacherUnavailable("x"), 500) or 0.0 for _ in range(300)]
    assert 0 <= min(first) < 0.05
    assert 0.45 < max(first) <= 0.5
    assert min(late) < 5
    assert 55 < max(late) <= LONGEST_WAIT_S


def test_the_teachers_wait_is_a_floor() -> None:
    wait_s = Backoff().wait_s(TeacherUnavailable("x", retry_after_s=120.0), 1)
    assert wait_s is not None
    assert 120.0 <= wait_s <= 120.5


def test_the_same_chance_gives_the_same_waits() -> None:
    one, two = Backoff(chance=random.Random(7)), Backoff(chance=random.Random(7))
    error = ConnectionBroken("x")
    assert [one.wait_s(error, n) for n in (1, 2, 3)] == [two.wait_s(error, n) for n in (1, 2, 3)]

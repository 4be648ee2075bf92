"""Check accuracies, their intervals and the recovery against known values."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peak_memory import most_held
from trainer.evaluation import intervals
from trainer.evaluation.scorecard import (
    JudgedPrompt,
    macro_average,
    recovery_interval,
    scorecard,
    wilson_interval,
)


def judged(task: str, split: str, student: int, teacher: int, count: int = 100) -> list[JudgedPrompt]:
    return [
        JudgedPrompt(f"{split}-{task}-{i}", task, split, False, i < student, i < teacher)
        for i in range(count)
    ]


def test_wilson_known_value():
    # Published value: for 8 of 10 the 95 % interval is (0.4902, 0.9433).
    assert wilson_interval(8, 10) == pytest.approx({"accuracy": 0.8, "low": 0.4902, "high": 0.9433}, abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_an_interval_holds_its_accuracy_and_stays_in_bounds(count, data):
    score = wilson_interval(data.draw(st.integers(0, count)), count)
    assert 0 <= score["low"] <= score["accuracy"] <= score["high"] <= 1
    mean = macro_average([score, wilson_interval(count, count)])
    assert 0 <= mean["low"] <= mean["accuracy"] <= mean["high"] <= 1


def test_the_card_has_the_promised_shape():
    card = scorecard([*judged("sum", "held_out", 60, 90), *judged("sql", "held_out", 80, 100)], resamples=500)
    assert json.loads(json.dumps(card)) == card
    assert set(card["tasks"]) == {"sum", "sql"}
    assert set(card["tasks"]["sum"]["student"]) == {"accuracy", "low", "high"}
    assert card["macro"]["student"]["accuracy"] == pytest.approx(0.7)
    assert card["recovery"] == pytest.approx(0.7 / 0.95)
    assert card["recovery_low"] < card["recovery"] < card["recovery_high"]


def test_other_splits_lie_beside_the_headline():
    card = scorecard(
        [*judged("sum", "held_out", 60, 90), *judged("double", "held_out_task", 0, 90)], resamples=9
    )
    assert card["split"] == "held_out"
    assert set(card["tasks"]) == {"sum"}
    assert card["splits"]["held_out_task"]["recovery"] == 0


def test_a_teacher_that_is_never_correct_has_no_recovery():
    card = scorecard(judged("sum", "held_out", 5, 0), resamples=9)
    assert (card["recovery"], card["recovery_low"], card["recovery_high"]) == (None, None, None)
    assert json.loads(json.dumps(card))["recovery"] is None
    assert card["macro"]["student"]["accuracy"] == 0.05


@pytest.mark.parametrize(("student", "recovery"), [(3, 1.0), (0, 0.0)])
def test_few_prompts_that_all_give_the_same_are_no_certainty(student, recovery):
    """No resample differs there; with 3 prompts McNemar's test gives p = 0.25 and the interval must agree."""
    card = scorecard(judged("sum", "held_out", student, 3, count=3), resamples=50)
    assert card["recovery"] == recovery
    assert card["recovery_low"] <= recovery <= card["recovery_high"]
    assert card["recovery_high"] - card["recovery_low"] > 0.5
    pair = card["paired"]["student_vs_teacher" if student == 0 else "student_vs_base"]
    assert pair["p"] == pytest.approx(0.25)
    assert pair["difference"]["low"] <= 0 <= pair["difference"]["high"]
    assert abs(pair["difference"]["value"]) == 1.0


def test_resamples_in_which_the_teacher_is_never_correct_do_not_pull_the_interval():
    # One correct teacher answer of 10: a third of the resamples miss it. The student is always correct.
    card = scorecard(judged("sum", "held_out", 10, 1, count=10), resamples=500)
    assert card["recovery"] == pytest.approx(10)
    assert card["recovery_low"] >= 1


def test_without_judged_prompts_the_card_is_empty():
    card = scorecard([])
    assert (card["tasks"], card["macro"], card["recovery"], card["prompts"]) == ({}, {}, None, 0)


def test_the_interval_of_the_recovery_is_drawn_in_pieces(monkeypatch):
    tasks = [[JudgedPrompt(f"p{n}", "a", "b", n % 3 == 0, n % 5 < 3, n % 7 > 0) for n in range(300)]] * 2
    at_once = recovery_interval(tasks, 200, seed=3)
    most = most_held(lambda: recovery_interval(tasks, 200, seed=3))
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 7 * 300)
    assert recovery_interval(tasks, 200, seed=3) == at_once
    assert most_held(lambda: recovery_interval(tasks, 200, seed=3)) < most / 4

"""Test the figures of a training that runs: time left, curves of bounded size, words without data."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.live import figures
from trainer.live.figures import Curve, Figures, span
from trainer.training.logbook import Evaluation, Sampled, StepLog, TrainingStarted


def line(step: int, **more: object) -> StepLog:
    facts = {
        "step": step,
        "steps": 100,
        "epoch": 0,
        "loss": 2.0 / step,
        "accuracy": 0.5,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 1000.0 + step,
        "supervised_per_s": 500.0,
        "skipped": 0,
        "padding": 0.0,
        "flop_per_s": 0.0,
        "mfu": None,
        "memory_bytes": 812 << 20,
        **more,
    }
    return StepLog(**facts)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_follows_the_last_lines_and_runs_down_between_them() -> None:
    clock = Clock()
    seen = Figures(clock)
    assert seen.left_s is None
    seen.add(TrainingStarted(10, 100, ("cpu",)))
    assert seen.left == "unknown"
    for step in range(11, 61):
        clock.now += 1.0 if step <= 40 else 3.0  # it became slower; what is older does not count
        seen.add(line(step))
    assert seen.left_s == pytest.approx(40 * 3.0)
    clock.now += 20.0
    assert seen.left_s == pytest.approx(100.0)
    clock.now += 1000.0
    assert seen.left_s == 0.0
    assert seen.elapsed_s == pytest.approx(30 + 60 + 1020)


def test_an_evaluation_counts_in_the_time_left() -> None:
    clock = Clock()
    seen = Figures(clock)
    seen.add(TrainingStarted(0, 100, ()))
    for step in (10, 20):
        clock.now += 10.0
        seen.add(line(step))
        clock.now += 10.0
        seen.add(Evaluation(step, 100, 1.5, step, 1.5, (), 10.0))
    clock.now += 10.0
    seen.add(line(30))
    assert seen.left_s == pytest.approx(70 * 50 / 30)


def test_an_unknown_peak_is_said_in_words_and_a_known_one_as_a_share() -> None:
    seen = Figures()
    seen.add(TrainingStarted(0, 100, ()))
    assert (seen.detail, seen.mfu, seen.memory) == ("first step", "unknown", "unknown")
    seen.add(line(10))
    assert seen.mfu == figures.UNKNOWN_MFU
    assert "MFU" not in seen.detail
    assert "812 MiB" in seen.detail
    seen.add(line(20, mfu=0.413, memory_bytes=93 << 30))
    assert "MFU 41.3%" in seen.detail
    assert "93.0 GiB" in seen.detail


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=9000))
def test_a_curve_stays_small_and_in_order_and_begins_where_the_values_do(values: list[float]) -> None:
    curve = Curve()
    for step, value in enumerate(values):
        curve.add(step, value)
    finite = [(step, value) for step, value in enumerate(values) if math.isfinite(value)]
    assert len(curve.points) <= figures.MOST_POINTS
    assert curve.points == sorted(curve.points, key=lambda point: point[0])
    assert set(curve.points) <= set(finite)
    assert curve.points[:1] == finite[:1]


def test_a_long_curve_keeps_points_from_everywhere() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(step, 1.0)
    steps = [step for step, _ in curve.points]
    assert figures.MOST_POINTS / 2 <= len(steps) <= figures.MOST_POINTS
    assert max(b - a for a, b in pairwise(steps)) <= 128
    assert steps[-1] > 99_000


def test_the_log_of_earlier_starts_is_taken_over_and_damage_is_left_out(tmp_path: Path) -> None:
    answers = [{"prompt_id": "p1", "prompt": "q", "answer": "a", "reference": None, "teacher": "t"}]
    rows = [
        {"step": 1, "loss": 3.0, "tokens_per_s": 10.0},
        {"step": 2, "loss": None, "tokens_per_s": 20.0},
        {"step": 2, "held_out_loss": 2.5, "answers": answers},
        {"step": 3, "answers": [{**answers[0], "answer": "b"}], "seconds": 1.0},
        {"loss": 1.0},
        {"step": 4, "loss": [], "answers": 7},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(f'{text}\n[1]\n"x"\n\x00\n{{"step": 5, "lo')
    seen = Figures()
    seen.read_log(tmp_path / "train.jsonl")
    seen.read_log(tmp_path / "none.jsonl")
    assert seen.loss.points == [(1, 3.0)]
    assert seen.speed.points == [(1, 10.0), (2, 20.0)]
    assert seen.held_out.points == [(2, 2.5)]
    assert (seen.answers_step, seen.answers[0]["answer"]) == (3, "b")
    seen.add(Sampled(6, 100, (), 0.1))  # none could be made: the older ones stay
    assert seen.answers_step == 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (91, "2 min"),
        (3599, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (1e6, "11 d 13 h"),
    ],
)
def test_spans_are_words(seconds: float, text: str) -> None:
    assert span(seconds) == text

"""Test intervals and paired tests against known values and against a planted truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluation import intervals


def test_mcnemar_is_the_exact_binomial_test():
    both, neither = [True] * 30, [False] * 7
    first = [*both, *neither, *[True] * 5, *[False] * 15]
    second = [*both, *neither, *[False] * 5, *[True] * 15]
    result = intervals.mcnemar(first, second)
    counts = {"only_first": 5, "only_second": 15, "both": 30, "neither": 7}
    assert {name: result[name] for name in counts} == counts
    # R: binom.test(5, 20)$p.value
    assert result["p"] == pytest.approx(0.04138947, abs=1e-8)
    assert intervals.mcnemar(first, first)["p"] == 1.0
    assert 0 < intervals.binomial_p(3000, 9000) < 1e-200  # no underflow to 0


def test_the_bootstrap_interval_of_a_mean_is_that_of_its_standard_error():
    draw = np.random.default_rng(1)
    values = draw.normal(3.0, 2.0, size=400)
    found = intervals.means({"x": values.tolist()}, 4000)["x"]
    half = 1.96 * values.std() / math.sqrt(400)
    assert found["value"] == pytest.approx(values.mean())
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.03)


def test_a_paired_difference_is_sharper_than_two_intervals():
    draw = np.random.default_rng(2)
    hard = draw.normal(0, 1, size=300)
    first, second = hard + 0.1, hard + draw.normal(0, 0.1, size=300)
    alone = intervals.means({"a": first.tolist(), "b": second.tolist()}, 1000)
    assert alone["a"]["low"] < alone["b"]["high"]
    paired = intervals.difference(first.tolist(), second.tolist(), 1000)
    assert paired is not None
    assert 0.05 < paired["low"] < 0.1 < paired["high"] < 0.15


def test_what_has_no_value_is_left_out_and_what_is_not_defined_is_none():
    assert intervals.means({"a": [1.0, None], "b": [None, None]}, 50) == {
        "a": {"value": 1.0, "low": 1.0, "high": 1.0},
        "b": None,
    }
    assert intervals.means({}, 50) == {}
    assert intervals.ratio([1.0, 2.0], [0.0, 0.0], 50) is None
    assert intervals.ratio([], [], 50) is None
    assert intervals.difference([None], [1.0], 50) is None
    assert intervals.ratio([1.0, 3.0], [2.0, 6.0], 50) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_many_rows_are_resampled_in_pieces_that_agree_with_one(monkeypatch):
    columns = np.arange(20.0)[:, None]
    whole = intervals.resampled_sums(columns, 300)
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 20 * 7)
    in_pieces = intervals.resampled_sums(columns, 300)
    assert whole.shape == in_pieces.shape == (300, 1)
    assert whole.mean() == pytest.approx(columns.sum(), rel=0.05)
    assert in_pieces.mean() == pytest.approx(columns.sum(), rel=0.05)

"""Test intervals and paired tests against known values and against a planted truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.quality.verifiers.wilson import wilson_limits
from trainer.evaluation import intervals

POINTS = st.sampled_from([0.0, 0.5, 1.0])


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
    paired = intervals.means({"difference": first - second}, 1000)["difference"]
    assert 0.05 < paired["low"] < 0.1 < paired["high"] < 0.15


def of_table(both: int, only_first: int, only_second: int, neither: int) -> dict[str, float]:
    first = [1.0] * (both + only_first) + [0.0] * (only_second + neither)
    second = [1.0] * both + [0.0] * only_first + [1.0] * only_second + [0.0] * neither
    found = intervals.difference_of_points(first, second)
    assert found is not None
    return found


def test_the_interval_of_paired_points_is_that_of_bonett_and_price():
    # Bentur et al. (2009), table V of Fagerland, Lydersen and Laake (2014).
    found = of_table(1, 1, 7, 12)
    assert found["value"] == pytest.approx(-6 / 21)
    assert (found["low"], found["high"]) == pytest.approx((-0.508, -0.013), abs=5e-4)
    # Cavo et al. (2012), from the proportions with one pair more in both cells.
    first, second, count = 7 / 163, 17 / 163, 163
    half = 1.959964 * math.sqrt((first + second - (first - second) ** 2) / count)
    found = of_table(59, 6, 16, 80)
    middle = first - second
    assert (found["low"], found["high"]) == pytest.approx((middle - half, middle + half))


@given(st.lists(st.tuples(POINTS, POINTS), min_size=1, max_size=60))
def test_the_interval_of_paired_points_holds_their_mean_and_is_no_point(pairs):
    first, second = zip(*pairs, strict=True)
    found = intervals.difference_of_points(first, second)
    assert found is not None
    assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["low"] < found["high"]
    turned = intervals.difference_of_points(second, first)
    assert turned is not None
    assert (turned["low"], turned["high"]) == pytest.approx((-found["high"], -found["low"]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_the_interval_of_a_mean_of_points_holds_it_and_is_no_point(points):
    found = intervals.mean_of_points(points)
    assert found["value"] == pytest.approx(sum(points) / len(points))
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1
    assert found["low"] < found["high"]


def test_the_mean_of_groups_is_that_of_one_and_narrows_with_more():
    one = {"value": 0.5, "low": 0.25, "high": 0.625}
    assert intervals.mean_of_groups([one]) == one
    assert intervals.mean_of_groups([one] * 4) == {"value": 0.5, "low": 0.375, "high": 0.5625}
    wide = {"value": -0.5, "low": -1.0, "high": 1.0}
    assert intervals.mean_of_groups([wide], least=-1.0) == wide


def test_limits_of_a_ratio():
    # Where the second is known exactly, those of the first are divided by it.
    assert intervals.ratio_limits(0.4, 0.5, (0.2, 0.7), (0.5, 0.5)) == pytest.approx((0.4, 1.4))
    # Symmetric limits: Fieller's interval for independent estimates (1954), g = (0.2 / 1)^2.
    low, high = intervals.ratio_limits(2.0, 1.0, (1.5, 2.5), (0.8, 1.2))
    root = math.sqrt((2.0 * 1.0) ** 2 - (2.0**2 - 0.5**2) * (1.0 - 0.2**2))
    assert (low, high) == pytest.approx(((2.0 - root) / (1 - 0.2**2), (2.0 + root) / (1 - 0.2**2)))
    assert intervals.ratio_limits(0.0, 0.5, (0.0, 0.1), (0.2, 1.0))[0] == 0.0


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_limits_of_a_ratio_of_shares_hold_it(count, of, data):
    right, found = data.draw(st.integers(0, count)), data.draw(st.integers(1, of))
    low, high = intervals.ratio_limits(
        right / count, found / of, wilson_limits(right, count), wilson_limits(found, of)
    )
    assert 0 <= low <= right / count / (found / of) <= high * (1 + 1e-12)
    assert low < high


def test_what_has_no_value_is_left_out_and_what_is_not_defined_is_none():
    assert intervals.means({"a": [1.0, None], "b": [None, None]}, 50) == {
        "a": {"value": 1.0, "low": 1.0, "high": 1.0},
        "b": None,
    }
    assert intervals.means({}, 50) == {}
    assert intervals.ratio([1.0, 2.0], [0.0, 0.0], 50) is None
    assert intervals.ratio([], [], 50) is None
    assert intervals.difference_of_points([None], [1.0]) is None
    assert intervals.ratio([1.0, 3.0], [2.0, 6.0], 50) == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_many_rows_are_resampled_in_pieces_that_agree_with_one(monkeypatch):
    columns = np.arange(20.0)[:, None]
    whole = intervals.resampled_sums(columns, 300)
    monkeypatch.setattr(intervals, "_MOST_COUNTS", 20 * 7)
    in_pieces = intervals.resampled_sums(columns, 300)
    assert whole.shape == in_pieces.shape == (300, 1)
    assert whole.mean() == pytest.approx(columns.sum(), rel=0.05)
    assert in_pieces.mean() == pytest.approx(columns.sum(), rel=0.05)

"""Check the fit of the cost curve as a law: planted curves are recovered, and intervals cover the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.experiments.power_law import HeldOutScores, bootstrap_fit, fit, percentiles

SIZES = (125, 250, 500, 1000, 2000, 4000)


@settings(max_examples=50)
@given(
    a=st.floats(0.5, 0.99),
    c=st.floats(0.1, 1.5),
    drop=st.floats(0.05, 0.45),
    falls=st.booleans(),
)
def test_a_planted_curve_without_noise_is_recovered(a, c, drop, falls):
    b = (-1 if falls else 1) * drop * SIZES[0] ** c  # the first score is `drop` away from the limit
    scores = [a - b * size**-c for size in SIZES]
    curve = fit(SIZES, [scores], (0.0, 1.0 if not falls else np.inf))
    assert curve.limit[0] == pytest.approx(a, abs=1e-3)
    assert curve.exponent[0] == pytest.approx(c, rel=5e-3)
    assert curve.factor[0] == pytest.approx(b, rel=0.03)
    for rows in (4000, 8000, 100_000):
        assert curve.at(rows)[0] == pytest.approx(a - b * rows**-c, abs=1e-3)


def test_the_limit_stays_within_its_bounds():
    rising = [0.2 + 0.1 * power for power in range(6)]  # a line over log(rows) has no limit
    curve = fit(SIZES, [rising], (0.0, 1.0))
    assert curve.limit[0] == pytest.approx(1.0)
    assert curve.at(10**9)[0] <= 1.0


def test_many_curves_at_once_are_those_fitted_alone():
    draw = np.random.default_rng(3)
    scores = 0.9 - 2 * np.array(SIZES) ** -0.4 + draw.normal(0, 0.02, size=(20, len(SIZES)))
    together = fit(SIZES, scores, (0.0, 1.0))
    for number, row in enumerate(scores):
        alone = fit(SIZES, [row], (0.0, 1.0))
        assert together.at(6000)[number] == pytest.approx(alone.at(6000)[0], abs=1e-9)


def planted(draw: np.random.Generator, prompts: int, noise: float) -> tuple[HeldOutScores, float]:
    """Scores of students on one held-out set, and the gain that 1,000 further rows really bring.

    A prompt is hard for all students alike by half, and a training adds noise of its own.
    """
    a, c = draw.uniform(0.75, 0.98), draw.uniform(0.2, 0.9)
    b = draw.uniform(0.3, 0.7) * a * SIZES[0] ** c
    chance = [a - b * size**-c + draw.normal(0, noise) for size in SIZES]
    shared = draw.random(prompts)
    hard = [np.where(draw.random(prompts) < 0.5, shared, draw.random(prompts)) for _ in SIZES]
    values = np.stack([each < p for each, p in zip(hard, chance, strict=True)])[:, None, :]
    truth = b * (SIZES[-1] ** -c - (SIZES[-1] + 1000) ** -c)
    weights, strata = np.ones(prompts), np.arange(prompts) % 4
    return HeldOutScores(values.astype(float), weights, strata), truth


@pytest.mark.parametrize("noise", [0.0, 0.015])
def test_the_interval_of_the_gain_covers_the_truth(noise):
    draw = np.random.default_rng(7)
    covered = 0
    for _ in range(40):
        scores, truth = planted(draw, 300, noise)
        gain = bootstrap_fit(SIZES, scores, (0.0, 1.0), resamples=200).gain(SIZES[-1], 1000, 1)
        covered += gain["low"] <= truth <= gain["high"]
        assert gain["low"] <= gain["value"] <= gain["high"]
    assert covered >= 36


def test_scores_that_do_not_improve_give_an_interval_around_zero():
    draw = np.random.default_rng(5)
    values = (draw.random((len(SIZES), 2, 500)) < 0.7).astype(float)
    table = HeldOutScores(values, np.ones(500), np.zeros(500, dtype=np.int64))
    gain = bootstrap_fit(SIZES, table, (0.0, 1.0), resamples=300).gain(SIZES[-1], 1000, 1)
    assert gain["low"] < 0 < gain["high"]


def test_noise_between_trainings_is_found_and_widens_the_interval_of_the_curve():
    draw = np.random.default_rng(9)
    scatter, width = [], []
    for noise in (0.0, 0.04):
        tables = [planted(draw, 1000, noise)[0] for _ in range(6)]
        fits = [bootstrap_fit(SIZES, table, (0.0, 1.0), resamples=100) for table in tables]
        scatter.append(np.mean([each.scatter for each in fits]))
        width.append(np.mean([np.ptp(percentiles(each.drawn.at(SIZES[-1]))) for each in fits]))
    assert scatter[0] < 0.01 < 0.015 < scatter[1] < 0.055
    assert width[1] > 1.5 * width[0]


def test_tasks_count_alike_and_are_resampled_apart():
    values = np.zeros((1, 1, 10))
    values[0, 0, :8] = 1.0  # all of the first task, none of the second
    strata = np.array([0] * 8 + [1] * 2)
    weights = np.array([1 / 8] * 8 + [1 / 2] * 2)
    table = HeldOutScores(values, weights, strata)
    assert table.means()[0, 0] == pytest.approx(0.5)
    drawn = table.resampled(np.random.default_rng(0), 50)
    assert drawn == pytest.approx(0.5)

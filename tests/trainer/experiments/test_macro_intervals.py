"""Test intervals of accuracies and their differences where prompts are few or all give the same."""

from __future__ import annotations

import numpy as np
import pytest

from harvester.quality.verifiers.wilson import wilson_limits
from trainer.evaluation import intervals
from trainer.experiments import loop_report, macro_intervals
from trainer.experiments.loop import _differences, _facts
from trainer.experiments.power_law import HeldOutScores
from trainer.experiments.stages import prompt_weights


def scores(base, teacher, *rounds, tasks=None):
    """Scores of students as a loop has them, and their resamples."""
    values = np.array([[of] for of in (base, teacher, *rounds)], dtype=float)
    table = HeldOutScores(values, *prompt_weights(tasks or ["t"] * len(base)))
    return table, table.resampled(np.random.default_rng(0), 500)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_loop_whose_prompts_all_give_the_same_claims_no_certainty(count):
    right, wrong = [1] * count, [0] * count
    table, drawn = scores(wrong, right, wrong, right, wrong, wrong)
    assert np.ptp(drawn[:, 3]) < 1e-12  # all resamples give the same, but for rounding
    facts = _facts(table, drawn, 3)
    assert facts["score"] == 1
    assert (facts["low"], facts["high"]) == pytest.approx(wilson_limits(count, count))
    first, second = _differences(table, drawn, 2)
    assert first == {"round": 1, "value": 0.0, "low": 0.0, "high": 0.0}  # one training, which both have
    assert second == pytest.approx({"round": 2, **intervals.difference_of_points(right, wrong)})
    assert second["low"] < second["value"] == 1
    verdict = loop_report.verdict_text({"differences": [second]})
    assert verdict.startswith("hard prompts teach more" if count == 12 else "no difference shown")


def test_tasks_of_one_prompt_each_have_an_interval_though_no_resample_differs():
    tasks, right = [str(n) for n in range(20)], [1, 0] * 10
    table, drawn = scores(right, right, right, right, tasks=tasks)
    assert np.ptp(drawn) < 1e-12
    facts = _facts(table, drawn, 0)
    assert facts["low"] < 0.4 < facts["score"] == 0.5 < 0.6 < facts["high"]


def test_many_prompts_that_differ_keep_the_interval_of_their_resamples():
    limits = (0.31, 0.52)
    values, strata = np.array([1.0, 0.0] * 10), np.zeros(20, dtype=np.int64)
    assert macro_intervals.accuracy(values, strata, limits) == {"value": 0.5, "low": 0.31, "high": 0.52}
    few = macro_intervals.accuracy(values[:8], strata[:8], limits)
    assert (few["low"], few["high"]) == pytest.approx(wilson_limits(4, 8))
    # the noise of trainings, which only the resamples hold
    assert macro_intervals.accuracy(values[:8], strata[:8], (0.0, 1.0)) == {"value": 0.5, "low": 0, "high": 1}

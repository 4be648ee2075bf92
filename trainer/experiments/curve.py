"""Measure how the quality of a student grows with the rows paid for (`trainer curve`), and predict the next.

Students are trained on nested subsets of a corpus, with as many steps as the largest, and scored on one
held-out set. A saturating power law is fitted to the scores; it predicts what further rows bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.data import dataset
from trainer.errors import DataError
from trainer.experiments import macro_intervals
from trainer.experiments.curve_report import steps_made
from trainer.experiments.power_law import (
    Fit,
    Floats,
    HeldOutScores,
    bootstrap_fit,
    fit,
    percentiles,
)
from trainer.experiments.stages import Score, Stages, prompt_weights
from trainer.experiments.subsets import CurvePlan
from trainer.experiments.trainings import NO_DISPLAY, Display

SCHEMA = "trainer.curve/1"
# Decimals of a predicted gain: less than a millionth counts as zero.
GAIN_DECIMALS = 6
# Points of the curve that is drawn.
CURVE_POINTS = 60


def measure_curve(
    plan: CurvePlan,
    display: Display = NO_DISPLAY,
) -> dict[str, Any]:
    """Train and score a student for every size and seed, and fit the curve.

    Returns:
        The content of curve.json; see trainer/CONFIG.md.

    Raises:
        DataError: no prompt is held out, or none can be scored.
        TermsRefused: the terms do not permit training on this corpus.
        Interrupted: a training was stopped by a signal; the same command goes on.
    """
    stages: Stages | None = None
    scores: dict[tuple[int, int], Score] = {}
    trained: dict[tuple[int, int], dict[str, Any]] = {}
    count = len(plan.sizes) * len(plan.seeds)
    largest = len(plan.sizes) - 1
    is_equal = plan.config.steps == "equal"
    # The largest first: what stands in the way of a training shows before hours were spent on small ones.
    for at in reversed(range(len(plan.sizes))):
        for number, seed in enumerate(plan.seeds):
            keys = plan.subsets[number][at]
            rows = dataset.read(plan.train, keys)
            stages = stages or Stages(
                plan.train,
                plan.folder,
                rows,
                plan.config.measure,
                display,
            )
            title = f"training {len(scores) + 1} of {count}, {len(keys):,} rows, seed {seed}"
            steps = int(trained[largest, number]["steps"]) if is_equal and at < largest else None
            training, trained[at, number] = stages.train(rows, seed, title, steps)
            scores[at, number] = stages.score(training, title)
    assert stages is not None
    return _result(plan, stages, scores, trained)


def _result(
    plan: CurvePlan,
    stages: Stages,
    scores: dict[tuple[int, int], Score],
    trained: dict[tuple[int, int], dict[str, Any]],
) -> dict[str, Any]:
    """Fit the curve to the scores and return the content of curve.json."""
    sizes = [float(np.mean([len(of[at]) for of in plan.subsets])) for at in range(len(plan.sizes))]
    scored = _common_prompts(plan, stages, [stages.score(None, "the base"), *scores.values()])
    table = HeldOutScores(
        np.array(
            [
                [_values(scores[at, number], scored) for number in range(len(plan.seeds))]
                for at in range(len(sizes))
            ]
        ),
        *_weights(plan.config.measure, stages, next(iter(scores.values())), scored),
    )
    is_loss = plan.config.measure == "loss"
    limits = (0.0, np.inf) if is_loss else (0.0, 1.0)
    fitted = bootstrap_fit(sizes, table, limits, resamples=plan.config.resamples, seed=plan.seeds[0])
    teacher = stages.teacher_score()
    return {
        "schema": SCHEMA,
        "measure": plan.config.measure,
        "steps": plan.config.steps,
        "seeds": list(plan.seeds),
        "held_out": {
            "split": stages.held_out[0].split,
            "prompts": len(stages.held_out),
            "scored": len(scored),
            "smallest_task": macro_intervals.fewest(table.strata),
        },
        "price": {
            "dollars_per_row": plan.paid.dollars_per_row,
            "rows": len(plan.paid.costs),
            "unpriced": plan.paid.unpriced,
        },
        "points": _points(plan, sizes, trained, fitted, table),
        "base": _mean_of(stages.score(None, "the base"), table, scored),
        "teacher": None if teacher is None else _mean_of(teacher, table, scored),
        "fit": _fit_facts(fitted),
        "prediction": _prediction(sizes, fitted.scores, limits),
        **_outlook(plan, fitted, sizes[-1]),
        "curve": _drawn_curve(fitted, sizes),
        "resamples": plan.config.resamples,
    }


def _points(
    plan: CurvePlan,
    sizes: Sequence[float],
    trained: dict[tuple[int, int], dict[str, Any]],
    fitted: Fit,
    table: HeldOutScores,
) -> list[dict[str, Any]]:
    """Return the measured sizes.

    Args:
        trained: summary of the training by number of the size and of the seed.
        table: scores of the held-out prompts.
    """
    means = table.means()

    def mean_of(what: str, at: int) -> float:
        return float(np.mean([trained[at, number][what] for number in range(len(plan.seeds))]))

    return [
        {
            "asked": plan.sizes[at],
            "rows": rows,
            "learned": mean_of("examples", at),
            "steps": float(np.mean([steps_made(trained[at, number]) for number in range(len(plan.seeds))])),
            "dollars": _mean_dollars(plan, at),
            "score": float(fitted.scores[at]),
            **_interval(plan, fitted, table, at),
            "by_seed": [float(mean) for mean in means[at]],
        }
        for at, rows in enumerate(sizes)
    ]


def _interval(plan: CurvePlan, fitted: Fit, table: HeldOutScores, at: int) -> dict[str, float]:
    low, high = fitted.intervals[at].tolist()
    if plan.config.measure == "accuracy":
        found = macro_intervals.accuracy(table.values[at].mean(axis=0), table.strata, (low, high))
        low, high = found["low"], found["high"]
    return {"low": low, "high": high}


def _mean_dollars(plan: CurvePlan, at: int) -> float | None:
    dollars = [plan.paid.dollars(of[at]) for of in plan.subsets]
    known = [each for each in dollars if each is not None]
    return float(np.mean(known)) if len(known) == len(dollars) else None


def _common_prompts(plan: CurvePlan, stages: Stages, scores: Sequence[Score]) -> list[int]:
    """Return the numbers of the prompts that every student has a score for.

    Raises:
        DataError: there is none.
    """
    scored = [
        number
        for number in range(len(stages.held_out))
        if all(score.values[number] is not None for score in scores)
    ]
    if not scored:
        is_loss = plan.config.measure == "loss"
        raise DataError(
            "no held-out prompt can be scored",
            place=str(plan.train.corpus),
            remedy="held-out prompts need an answer of the teacher"
            if is_loss
            else 'give held-out prompts a reference or a [verify] table, or set measure = "loss"',
        )
    return scored


def _values(score: Score, scored: Sequence[int]) -> list[float]:
    return [float(score.values[number] or 0.0) for number in scored]


def _weights(measure: str, stages: Stages, score: Score, scored: Sequence[int]) -> tuple[Floats, Any]:
    """Return the weight and the stratum of each prompt.

    Tasks count alike in an accuracy, tokens in a loss.
    """
    if measure == "loss":
        return np.array([score.weights[number] for number in scored]), np.zeros(len(scored), dtype=np.int64)
    return prompt_weights([stages.held_out[number].task for number in scored])


def _mean_of(score: Score, table: HeldOutScores, scored: Sequence[int]) -> float:
    values = np.array([float(score.values[number] or 0.0) for number in scored])
    return float(values @ table.weights / table.weights.sum())


def _fit_facts(fitted: Fit) -> dict[str, Any]:
    def with_interval(best: Floats, drawn: Floats) -> dict[str, float]:
        low, high = percentiles(drawn)
        return {"value": float(best[0]), "low": low, "high": high}

    return {
        "formula": "score = a - b * rows^-c",
        "a": with_interval(fitted.best.limit, fitted.drawn.limit),
        "b": with_interval(fitted.best.factor, fitted.drawn.factor),
        "c": with_interval(fitted.best.exponent, fitted.drawn.exponent),
        "scatter": fitted.scatter,
    }


def _prediction(sizes: Sequence[float], scores: Floats, limits: tuple[float, float]) -> dict[str, float]:
    """Predict the largest size from the smaller ones, to see how far the curve can be trusted."""
    curve = fit(sizes[:-1], scores[None, :-1], limits)
    predicted, measured = float(curve.at(sizes[-1])[0]), float(scores[-1])
    return {
        "rows": sizes[-1],
        "predicted": predicted,
        "measured": measured,
        "error": predicted - measured,
    }


def _outlook(plan: CurvePlan, fitted: Fit, rows: float) -> dict[str, Any]:
    """Return what the next dollars and twice the rows are predicted to bring, and the verdict."""
    sign = -1 if plan.config.measure == "loss" else 1
    price = plan.paid.dollars_per_row
    further = plan.config.next_rows if price is None else plan.config.next_dollars / price

    def gain(more: float) -> dict[str, Any]:
        facts = {k: round(v, GAIN_DECIMALS) for k, v in fitted.gain(rows, more, sign).items()}
        return {"rows": more, "dollars": None if price is None else more * price, "gain": facts}

    nearest = gain(further)
    stops = nearest["gain"]["low"] <= plan.config.least_gain
    return {
        "next": nearest,
        "doubling": gain(rows),
        "least_gain": plan.config.least_gain,
        "verdict": "stop here" if stops else "go on",
    }


def _drawn_curve(fitted: Fit, sizes: Sequence[float]) -> list[dict[str, float]]:
    """Return the curve and its 95 % interval from the smallest size to twice the largest."""
    points = []
    for rows in np.geomspace(sizes[0], 2 * sizes[-1], CURVE_POINTS):
        low, high = percentiles(fitted.drawn.at(rows))
        points.append(
            {"rows": float(rows), "score": float(fitted.best.at(rows)[0]), "low": low, "high": high}
        )
    return points

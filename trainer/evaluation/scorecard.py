"""Compute accuracies with intervals and the recovery of the teacher (student / teacher accuracy)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from harvester.quality.verifiers.wilson import wilson_limits
from trainer.evaluation import intervals

MODELS = ("base", "student", "teacher")
# Pairs whose right answers are compared on the same prompts.
PAIRS = (("student", "base"), ("student", "teacher"))
# Tags with an accuracy of their own: the commonest, with so many prompts at least.
MOST_TAGS, FEWEST_PROMPTS = 40, 5
HEADLINE_SPLIT = "held_out"


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """Hold a held-out prompt and whether each model answered it correctly."""

    prompt_id: str
    task: str
    split: str
    base: bool
    student: bool
    teacher: bool
    tags: tuple[str, ...] = ()


def wilson_interval(right: int, count: int) -> dict[str, float]:
    """Return the accuracy with its 95 % Wilson score interval (Wilson 1927), valid at 0 and 1 too."""
    low, high = wilson_limits(right, count)
    return {"accuracy": right / count if count else 0.0, "low": low, "high": high}


def macro_average(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of accuracies, with limits combined by MOVER (Zou and Donner 2008)."""
    found = intervals.mean_of_groups([{**s, "value": s["accuracy"]} for s in scores])
    return {"accuracy": found["value"], "low": found["low"], "high": found["high"]}


def scorecard(judged: Sequence[JudgedPrompt], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Compute accuracies per task and model, and the recovery of the teacher's accuracy by the student.

    Returns:
        `tasks.<name>.<model>.{accuracy,low,high}` and the same under `macro`; `recovery` (macro accuracy of
        the student / of the teacher) with `recovery_low` and `recovery_high` (paired bootstrap, stratified
        by task; from the limits of both accuracies where no resample differs), all None if the teacher is
        never correct; `split`, whose prompts these are (`held_out` if there is such a split); and each other
        split in the same shape under `splits.<name>`. `tags.<tag>` has the accuracies of prompts with a tag;
        `paired.student_vs_base` and `paired.student_vs_teacher` McNemar's test and the paired difference of
        the accuracies, over all prompts and by task. Without judged prompts `tasks`, `macro`, `tags`,
        `paired` and `splits` are empty.
    """
    if not judged:
        return {**_card([], resamples, seed), "split": HEADLINE_SPLIT, "splits": {}}
    splits = sorted({j.split for j in judged})
    headline = HEADLINE_SPLIT if HEADLINE_SPLIT in splits else splits[0]
    card = _card([j for j in judged if j.split == headline], resamples, seed)
    card["split"] = headline
    card["splits"] = {
        name: _card([j for j in judged if j.split == name], resamples, seed)
        for name in splits
        if name != headline
    }
    return card


def _card(judged: Sequence[JudgedPrompt], resamples: int, seed: int) -> dict[str, Any]:
    by_task: dict[str, list[JudgedPrompt]] = {}
    for prompt in sorted(judged, key=lambda j: j.prompt_id):
        by_task.setdefault(prompt.task, []).append(prompt)
    tasks = {task: _accuracies(by_task[task]) for task in sorted(by_task)}
    macro = {name: macro_average([tasks[t][name] for t in tasks]) for name in MODELS} if tasks else {}
    recovery = _ratio(macro["student"]["accuracy"], macro["teacher"]["accuracy"]) if macro else None
    interval = recovery_interval(list(by_task.values()), resamples, seed) if recovery is not None else None
    if interval is not None and interval[0] == interval[1]:  # in each task all prompts give the same
        interval = _ratio_limits(macro["student"], macro["teacher"])
    low, high = interval or (None, None)
    return {
        "tasks": tasks,
        "macro": macro,
        "recovery": recovery,
        "recovery_low": low,
        "recovery_high": high,
        "prompts": len(judged),
        "tags": {tag: _accuracies(rows) for tag, rows in _by_tag(judged).items()},
        "paired": _paired(judged, by_task) if judged else {},
    }


def _accuracies(rows: Sequence[JudgedPrompt]) -> dict[str, Any]:
    scores: dict[str, Any] = {
        name: wilson_interval(sum(getattr(j, name) for j in rows), len(rows)) for name in MODELS
    }
    return {**scores, "prompts": len(rows)}


def _by_tag(judged: Sequence[JudgedPrompt]) -> dict[str, list[JudgedPrompt]]:
    counts = Counter(tag for j in judged for tag in j.tags)
    shown = sorted(tag for tag, count in counts.most_common(MOST_TAGS) if count >= FEWEST_PROMPTS)
    return {tag: [j for j in judged if tag in j.tags] for tag in shown}


def _paired(judged: Sequence[JudgedPrompt], by_task: Mapping[str, Sequence[JudgedPrompt]]) -> dict[str, Any]:
    return {
        f"{first}_vs_{second}": {
            **_pair(judged, first, second),
            "tasks": {task: _pair(rows, first, second) for task, rows in sorted(by_task.items())},
        }
        for first, second in PAIRS
    }


def _pair(rows: Sequence[JudgedPrompt], first: str, second: str) -> dict[str, Any]:
    ours, theirs = ([bool(getattr(j, name)) for j in rows] for name in (first, second))
    return {
        **intervals.mcnemar(ours, theirs),
        "difference": intervals.difference_of_points(ours, theirs),
    }


def recovery_interval(
    by_task: Sequence[Sequence[JudgedPrompt]], resamples: int, seed: int
) -> tuple[float, float] | None:
    """Return the 95 % percentile bootstrap interval (Efron 1979) of student / teacher accuracy.

    Resamples in which the teacher is never correct have no ratio and are left out.

    Returns:
        None if no resample has a ratio.
    """
    draw = np.random.default_rng(seed)
    student, teacher = np.zeros(resamples), np.zeros(resamples)
    for rows in by_task:
        right = np.array([[j.student, j.teacher] for j in rows], dtype=float).T
        for few in intervals.in_pieces(resamples, len(rows)):
            picked = draw.integers(len(rows), size=(few.stop - few.start, len(rows)))
            student[few] += right[0][picked].mean(axis=1)
            teacher[few] += right[1][picked].mean(axis=1)
    has_ratio = teacher > 0
    if not has_ratio.any():
        return None
    low, high = np.percentile(student[has_ratio] / teacher[has_ratio], [2.5, 97.5])
    return float(low), float(high)


def _ratio_limits(student: Mapping[str, float], teacher: Mapping[str, float]) -> tuple[float, float]:
    return intervals.ratio_limits(
        student["accuracy"],
        teacher["accuracy"],
        (student["low"], student["high"]),
        (teacher["low"], teacher["high"]),
    )


def _ratio(student: float, teacher: float) -> float | None:
    return student / teacher if teacher else None

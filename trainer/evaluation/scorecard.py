"""Compute accuracies with intervals and the recovery of the teacher (student / teacher accuracy)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MODELS = ("base", "student", "teacher")
HEADLINE_SPLIT = "held_out"
Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True, slots=True)
class JudgedPrompt:
    """One held-out prompt and who answered it rightly."""

    prompt_id: str
    task: str
    split: str
    base: bool
    student: bool
    teacher: bool


def is_correct(answer: str | None, reference: str) -> bool:
    """The exact verifier: equal after stripping outer white space of the answer."""
    return answer is not None and answer.strip() == reference.strip()


def wilson_interval(right: int, count: int) -> dict[str, float]:
    """Accuracy with its Wilson score interval (Wilson 1927), 95 %; also valid at 0 and 1."""
    if count == 0:
        return {"accuracy": 0.0, "low": 0.0, "high": 1.0}
    p, n = right / count, float(count)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return {"accuracy": p, "low": min(p, max(0.0, middle - half)), "high": max(p, min(1.0, middle + half))}


def macro_average(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of accuracies; limits by MOVER (Zou and Donner 2008), which combines the Wilson limits."""
    k = len(scores)
    mean = sum(s["accuracy"] for s in scores) / k
    down = math.sqrt(sum((s["accuracy"] - s["low"]) ** 2 for s in scores)) / k
    up = math.sqrt(sum((s["high"] - s["accuracy"]) ** 2 for s in scores)) / k
    return {"accuracy": mean, "low": max(0.0, mean - down), "high": min(1.0, mean + up)}


def scorecard(judged: Sequence[JudgedPrompt], *, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The judged comparison. The headline is the content-held-out split.

    Returns:
        `tasks.<name>.<who>.{accuracy,low,high}`, the same under `macro`, `recovery` (student / teacher of
        the macro accuracies) with `recovery_low` and `recovery_high` (paired bootstrap, stratified by
        task), and each other split under `splits.<name>` in the same shape.

    Raises:
        ValueError: nothing was judged.
    """
    if not judged:
        raise ValueError("nothing was judged")
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
    for each in sorted(judged, key=lambda j: j.prompt_id):
        by_task.setdefault(each.task, []).append(each)
    tasks: dict[str, Any] = {}
    for task in sorted(by_task):
        rows = by_task[task]
        tasks[task] = {who: wilson_interval(sum(getattr(j, who) for j in rows), len(rows)) for who in MODELS}
        tasks[task]["prompts"] = len(rows)
    total = {who: macro_average([tasks[t][who] for t in tasks]) for who in MODELS}
    low, high = recovery_interval(list(by_task.values()), resamples, seed)
    return {
        "tasks": tasks,
        "macro": total,
        "recovery": _ratio(total["student"]["accuracy"], total["teacher"]["accuracy"]),
        "recovery_low": low,
        "recovery_high": high,
        "prompts": len(judged),
    }


def recovery_interval(
    by_task: Sequence[Sequence[JudgedPrompt]], resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile bootstrap of student / teacher accuracy (Efron 1979), per task."""
    draw = np.random.default_rng(seed)
    student, teacher = np.zeros(resamples), np.zeros(resamples)
    for rows in by_task:
        picked = draw.integers(len(rows), size=(resamples, len(rows)))
        student += np.array([j.student for j in rows], dtype=float)[picked].mean(axis=1)
        teacher += np.array([j.teacher for j in rows], dtype=float)[picked].mean(axis=1)
    ratios = np.divide(student, teacher, out=np.zeros(resamples), where=teacher > 0)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def _ratio(student: float, teacher: float) -> float:
    return student / teacher if teacher else 0.0

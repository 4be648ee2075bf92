"""Show the student on the page: its scores next to the teacher's, and its training loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harvester.errors import ConfigError
from harvester.observe.report import charts, text_scores
from harvester.observe.report.charts import Series
from harvester.observe.report.figures import figure


@dataclass(frozen=True, slots=True)
class Interval:
    """A point with its confidence limits, all as shares in [0, 1]."""

    accuracy: float
    low: float
    high: float


def read_training(training: Path | None) -> list[dict[str, Any]]:
    """Return the lines of a train.jsonl, one for each step; of a resumed training the newer one.

    A line with `held_out_loss` is an evaluation; its values are added to the line of its step. One with
    `answers` alone holds sampled answers, and is left out.

    Returns:
        The lines in order of their steps; none without a file.

    Raises:
        ConfigError: it is missing or no training log.
    """
    if training is None:
        return []
    steps: dict[float, dict[str, Any]] = {}
    evaluations: dict[float, dict[str, Any]] = {}
    try:
        for line in training.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line) if line.strip() else {}
            if "held_out_loss" in entry:
                evaluations[float(entry["step"])] = entry
                continue
            if "answers" in entry:
                continue
            numbers = {name: float(entry[name]) for name in ("step", "loss") if name in entry}
            if entry and len(numbers) < 2:
                raise ConfigError(
                    "not a training log", place=str(training), remedy="`trainer train` writes train.jsonl"
                )
            if numbers and all(map(math.isfinite, numbers.values())):  # a step that was skipped has no loss
                steps[numbers["step"]] = entry
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"training log can't be read: {error}",
            place=str(training),
            remedy="`trainer train` writes train.jsonl",
        ) from None
    return [{**evaluations.get(step, {}), **steps[step]} for step in sorted(steps)]


def read_scorecard(scorecard: Path | None) -> Mapping[str, Any] | None:
    """Return a scorecard.json; None for None.

    Raises:
        ConfigError: it is missing or no scorecard.
    """
    if scorecard is None:
        return None
    try:
        loaded = json.loads(scorecard.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"scorecard can't be read: {error}", place=str(scorecard), remedy="`trainer evaluate` writes one"
        ) from None
    if not isinstance(loaded, dict) or not {"tasks", "macro", "recovery"} <= set(loaded):
        raise ConfigError("not a scorecard", place=str(scorecard), remedy="`trainer evaluate` writes one")
    try:
        scorecard_parts(loaded)
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"not a scorecard: {error!r}", place=str(scorecard), remedy="`trainer evaluate` writes one"
        ) from None
    return loaded


def scorecard_parts(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return drawing, table rows and notes of a scorecard."""
    who: Sequence[str] = ("base", "student", "teacher")
    named = {**card["tasks"], "macro": card["macro"]} if card["macro"] else {}
    points = {
        task: {name: Interval(s[name]["accuracy"], s[name]["low"], s[name]["high"]) for name in who}
        for task, s in named.items()
    }
    rows = []
    for task, score in points.items():
        teacher = score["teacher"].accuracy
        cells = {name: f"{p.accuracy:.1%} ({p.low:.0%}–{p.high:.0%})" for name, p in score.items()}
        recovery = f"{score['student'].accuracy / teacher:.2f}" if teacher else "–"
        rows.append({"name": task, "total": task == "macro", "recovery": recovery, **cells})
    return {
        "drawing": accuracies(points, who) if points else None,
        "rows": rows,
        "judged_by": _judged_by(card),
        "notes": _notes(card) if points else [],
        **text_scores.text_parts(card),
    }


# How answers are compared with the reference, in words.
_COMPARISONS = {
    "exact": "it is the reference",
    "normalised": "it is the reference, but for case, white space and outer punctuation",
    "contains": "it contains the reference as whole words",
    "numeric": "its last number is the reference's",
    "choice": "it names the reference's letter",
}


def _judged_by(card: Mapping[str, Any]) -> str:
    """Return by what rule an answer counts as right."""
    kinds: dict[str, list[str]] = {}
    for task, kind in (card.get("judged_by") or {"": "exact"}).items():
        kinds.setdefault(_COMPARISONS.get(kind, f"its verifier ({kind}) passes it"), []).append(task)
    if len(kinds) == 1:
        return f"An answer is right if {next(iter(kinds))}."
    return " ".join(f"{', '.join(tasks)}: right if {rule}." for rule, tasks in kinds.items())


def _notes(card: Mapping[str, Any]) -> list[str]:
    recovery = card["recovery"]
    notes = [f"Macro recovery {recovery:.3f}" if recovery is not None else "Macro recovery –"]
    for name, split in (card.get("splits") or {}).items():
        macro = split.get("macro") if isinstance(split, dict) else None
        if macro:
            figures = ", ".join(
                f"{who} {macro[who]['accuracy']:.1%}" for who in ("base", "student", "teacher")
            )
            notes.append(f"{name.replace('_', ' ')}: {figures}")
    return notes


def training_charts(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw the loss and token accuracy by step, and the held-out loss where it was measured."""
    loss = [(float(entry["step"]), float(entry["loss"])) for entry in lines]
    right = [(float(entry["step"]), float(entry.get("accuracy", 0)) * 100) for entry in lines]

    def step(x: float) -> str:
        return f"step {x:,.0f}"

    curves = [
        ("Training loss", loss, "two", f"Nats per supervised token; {loss[-1][1]:.3g} at the end."),
        (
            "Tokens predicted right, %",
            right,
            "three",
            f"Teacher-forced, on training rows; {right[-1][1]:.1f} % at the end.",
        ),
    ]
    held_out = [
        (float(entry["step"]), float(entry["held_out_loss"]))
        for entry in lines
        if entry.get("held_out_loss") is not None
    ]
    if held_out:
        best_step, best_loss = min(held_out, key=lambda point: point[1])
        note = f"Nats per supervised token of held-out answers; lowest {best_loss:.3g} at {step(best_step)}."
        curves.insert(1, ("Held-out loss", held_out, "one", note))
    return [
        figure(title, charts.lines([Series(title, curve, kind, area=True)], x=step, width=charts.WIDE), note)
        for title, curve, kind, note in curves
    ]


def accuracies(tasks: Mapping[str, Mapping[str, Interval]], who: Sequence[str]) -> Markup:
    """Return a dot with its interval for each of `who`, one band a task, on a 0..100 % axis."""
    return text_scores.share_dots(
        {
            task: {
                name: {"value": scores[name].accuracy, "low": scores[name].low, "high": scores[name].high}
                for name in who
            }
            for task, scores in tasks.items()
        }
    )

"""Say what a cost curve found: lines for the terminal, and curve.html."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.experiments.macro_intervals import few_note, too_few
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, Measured, plot
from trainer.files import write_report

# Error of the predicted largest size, as a share, above which the page warns.
LARGE_ERROR = 0.02


def score_text(value: float, measure: str) -> str:
    """Return an accuracy in percent, or a loss in nats per token."""
    return f"{value:.1%}" if measure == "accuracy" else f"{value:.4f}"


def gain_text(gain: Mapping[str, float], measure: str) -> str:
    """Return a gain with its interval: points of accuracy, or nats per token."""
    scale, unit, digits = (100, " points", 2) if measure == "accuracy" else (1, " nats per token", 5)
    smallest = min((abs(scale * gain[key]) for key in ("value", "low") if gain[key]), default=1.0)
    digits = max(digits, math.ceil(-math.log10(smallest)))  # what decides the verdict is not shown as zero
    value, low, high = (f"{scale * gain[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} ({low} to {high})"


def money(value: float) -> str:
    """Return US dollars: cents, or three significant digits of a smaller amount."""
    if value >= 1 or value == 0:
        return f"${value:,.2f}"
    return f"${np.format_float_positional(value, precision=3, fractional=False, trim='-')}"


def steps_made(trained: Mapping[str, Any]) -> int:
    """Return how many steps a training made, given its summary: patience may end it before the last one."""
    return int(trained.get("steps_done") or trained["steps"])  # summaries of earlier versions lack it


def amount_text(step: Mapping[str, Any]) -> str:
    """Return what further rows cost, or their number where they have no price."""
    rows = f"{step['rows']:,.0f} rows" if step["rows"] >= 10 else f"{step['rows']:.2g} rows"
    return rows if step["dollars"] is None else f"{money(step['dollars'])} ({rows})"


def formula_text(fit: Mapping[str, Any], measure: str) -> str:
    """Return the fitted curve."""
    a, b, c = (fit[name]["value"] for name in ("a", "b", "c"))
    sign = "-" if b >= 0 else "+"
    return f"{measure} = {a:.4g} {sign} {abs(b):.4g} * rows^-{c:.3g}"


def verdict_text(curve: Mapping[str, Any]) -> str:
    """Return the verdict with its reason."""
    measure, step = curve["measure"], curve["next"]
    what = "dollars" if step["dollars"] is not None else "rows"
    gain = f"the next {amount_text(step)} are predicted to bring {gain_text(step['gain'], measure)}"
    if curve["verdict"] == "go on":
        few = curve["held_out"]["smallest_task"]
        return f"go on: {gain}" + (f", which {few:,} held-out prompts can't show" if too_few(few) else "")
    if step["gain"]["low"] <= 0:
        return f"stop here: {gain}, an interval that holds zero or less"
    return f"stop here: {gain}, which may be less than the least gain that the {what} have to bring"


def notes(curve: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know to judge the curve."""
    price, fit, prediction = curve["price"], curve["fit"], curve["prediction"]
    measure = curve["measure"]
    scale = 100 if measure == "accuracy" else 1
    unit = "points" if measure == "accuracy" else "nats per token"
    lines = []
    if price["dollars_per_row"] is None:
        lines.append(
            f"{price['unpriced']:,} of {price['rows']:,} rows have no cost in the store, "
            "so this is in rows, not in dollars"
        )
    else:
        lines.append(
            f"a row cost {money(price['dollars_per_row'])} on average; failed requests are not in it"
        )
    lines.append(
        f"from the smaller sizes alone the curve predicts "
        f"{score_text(prediction['predicted'], measure)} for {prediction['rows']:,.0f} rows; "
        f"measured were {score_text(prediction['measured'], measure)}, "
        f"an error of {scale * prediction['error']:+.2f} {unit}"
    )
    if measure == "accuracy" and abs(prediction["error"]) > LARGE_ERROR:
        lines.append(
            "that error is large: these scores don't follow the curve, so its predictions are rough; "
            "name larger sizes, where the score has begun to flatten, or more seeds"
        )
    lines += few_note(
        curve["held_out"]["smallest_task"],
        "held-out prompts" + (" of a task" if measure == "accuracy" else ""),
    )
    base = curve["base"]
    if not any(p["low"] > base if measure == "accuracy" else p["high"] < base for p in curve["points"]):
        lines.append(
            "no size scores clearly better than the untrained base, so this says nothing about further rows: "
            "make more steps ([train] epochs)" + (', or measure = "loss"' if measure == "accuracy" else "")
        )
    lines.append(
        f"scatter about the curve, beyond what the held-out prompts explain: "
        f"{scale * fit['scatter']:.2f} {unit}"
    )
    if curve["steps"] == "epochs":
        lines.append(
            "fewer rows had fewer steps as well, so a part of what further rows bring is that of steps; "
            'steps = "equal" tells them apart'
        )
    if len(curve["seeds"]) == 1:
        lines.append("each size was trained once; several seeds would measure the noise between trainings")
    held_out = curve["held_out"]
    if held_out["scored"] < held_out["prompts"]:
        missing = held_out["prompts"] - held_out["scored"]
        lines.append(f"{missing:,} of {held_out['prompts']:,} held-out prompts can't be scored")
    return lines


def text_lines(curve: Mapping[str, Any]) -> list[str]:
    """Return the result as lines for the terminal."""
    measure = curve["measure"]
    lines = [
        f"{point['rows']:>10,.0f} rows  {'' if point['dollars'] is None else money(point['dollars']):>10}  "
        f"{score_text(point['score'], measure)} "
        f"({score_text(point['low'], measure)} to {score_text(point['high'], measure)})"
        for point in curve["points"]
    ]
    teacher = curve["teacher"]
    lines.append(
        f"base {score_text(curve['base'], measure)}"
        + (f", teacher {score_text(teacher, measure)}" if teacher is not None else "")
    )
    lines.append(formula_text(curve["fit"], measure))
    double = curve["doubling"]
    lines.append(
        f"twice the rows, {amount_text(double)} more: predicted {gain_text(double['gain'], measure)}"
    )
    lines += [f"note: {line}" for line in notes(curve)]
    lines.append(verdict_text(curve))
    return lines


def write(curve: Mapping[str, Any], folder: Path, name: str) -> tuple[str, str]:
    """Write curve.html and curve.json into a folder; return their paths.

    Raises:
        StoreError: the disk refuses.
    """
    return write_report(folder, "curve", page(curve, name), curve)


def page(curve: Mapping[str, Any], name: str) -> str:
    """Return curve.html.

    Args:
        name: of the student.
    """
    measure, points, fit = curve["measure"], curve["points"], curve["fit"]
    line = Line(
        f"{measure} of the student",
        "one",
        measured=[Measured(p["rows"], p["score"], p["low"], p["high"]) for p in points],
        path=[(p["rows"], p["score"]) for p in curve["curve"]],
        band=[(p["rows"], p["low"], p["high"]) for p in curve["curve"]],
    )
    levels = {"base": curve["base"]}
    if curve["teacher"] is not None:
        levels["teacher"] = curve["teacher"]
    dollars_per_row = curve["price"]["dollars_per_row"]

    def below(rows: float) -> str:
        count = f"{rows:,.0f}"
        return count if dollars_per_row is None else f"{count}\n{money(rows * dollars_per_row)}"

    x = Axis(
        "rows" if dollars_per_row is None else "rows, and what they cost",
        below,
        _x_ticks([p["rows"] for p in points]),
        is_log=True,
    )
    y = Axis(
        "accuracy" if measure == "accuracy" else "loss in nats per token",
        lambda value: f"{value:.4g}" if measure == "loss" else f"{100 * value:.4g} %",
    )
    limit = fit["a"]
    shown = {key: score_text(limit[key], measure) for key in ("value", "low", "high")}
    return Page(
        title=f"Cost and quality of {name}",
        lead=f"{len(points)} sizes of one corpus, seeds {', '.join(map(str, curve['seeds']))}, scored on "
        f"{curve['held_out']['scored']:,} prompts of the split {curve['held_out']['split']}",
        verdict=verdict_text(curve),
        stops=curve["verdict"] == "stop here",
        tiles=[
            (gain_text(curve["next"]["gain"], measure), f"from the next {amount_text(curve['next'])}"),
            (gain_text(curve["doubling"]["gain"], measure), f"from {amount_text(curve['doubling'])} more"),
            (f"{shown['value']} ({shown['low']} to {shown['high']})", "approached with ever more rows"),
        ],
        plot_title="Score by rows, with 95 % intervals; the curve goes on to twice the rows",
        plot=plot([line], x, y, levels),
        legend=(),
        notes=[formula_text(fit, measure), *notes(curve)],
        tables=[_table(curve, measure)],
    ).render()


def _x_ticks(rows: Sequence[float]) -> list[float]:
    """Return where the axis has numbers: twice the largest size, and sizes that are not too close."""
    kept = [2 * rows[-1]]
    for size in reversed(rows):
        if size <= kept[-1] / 1.6:
            kept.append(size)
    return kept[::-1]


def _table(curve: Mapping[str, Any], measure: str) -> Table:
    columns = ["rows", "rows learned", "steps", "dollars", measure, "95 % interval", "by seed"]
    rows = [
        [
            f"{point['rows']:,.0f}",
            f"{point['learned']:,.0f}",
            f"{point['steps']:,.0f}",
            "–" if point["dollars"] is None else money(point["dollars"]),
            score_text(point["score"], measure),
            f"{score_text(point['low'], measure)} to {score_text(point['high'], measure)}",
            ", ".join(score_text(value, measure) for value in point["by_seed"]),
        ]
        for point in curve["points"]
    ]
    return Table("Measured", columns, rows)

"""Say what a loop found: lines for the terminal, and loop.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.experiments.curve_report import money, score_text
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, Measured, plot
from trainer.files import write_report

_ENDINGS = {
    "complete": "all rounds are complete",
    "budget": "the budget ended the loop",
    "pool": "the pool has no further prompts",
}


def write(loop: Mapping[str, Any], folder: Path, name: str) -> tuple[str, str]:
    """Write loop.html and loop.json into a folder; return their paths.

    Raises:
        StoreError: the disk refuses.
    """
    return write_report(folder, "loop", page(loop, name), loop)


def interval_text(facts: Mapping[str, float]) -> str:
    """Return an accuracy with its interval."""
    score, low, high = (score_text(facts[key], "accuracy") for key in ("score", "low", "high"))
    return f"{score} ({low} to {high})"


def difference_text(difference: Mapping[str, float]) -> str:
    """Return a difference of accuracies in points, with its interval."""
    value, low, high = (f"{100 * difference[key]:+.2f}" for key in ("value", "low", "high"))
    return f"{value} points ({low} to {high})"


def verdict_text(loop: Mapping[str, Any]) -> str:
    """Return what the last round says."""
    if not loop["differences"]:
        last = loop["rounds"][-1]
        return f"after round {last['round']}: {interval_text(last)}; {_ENDINGS[loop['ending']]}"
    last = loop["differences"][-1]
    compared = f"after round {last['round']} with as many rows: {difference_text(last)}"
    if last["low"] > 0:
        return f"hard prompts teach more than random ones {compared}"
    if last["high"] < 0:
        return f"hard prompts teach less than random ones {compared}"
    return f"no difference shown between hard and random prompts {compared}"


def notes(loop: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know to judge the loop."""
    lines = [
        f"{_ENDINGS[loop['ending']]}; the pool has {loop['pool']:,} prompts",
        "learned are the rows so far whose answers pass their verifier; failed requests are not in the cost",
    ]
    if loop["differences"]:
        lines.append("both ways of choosing share the first round, as no student has learned yet")
    if filled := sum(row["filled"] for row in loop["rounds"]):
        lines.append(f"{filled:,} prompts were chosen at random because too few were failed")
    held_out = loop["held_out"]
    if held_out["scored"] < held_out["prompts"]:
        missing = held_out["prompts"] - held_out["scored"]
        lines.append(f"{missing:,} of {held_out['prompts']:,} held-out prompts can't be judged")
    lines.append("one training a round: the intervals hold the held-out prompts' noise, not the training's")
    return lines


def text_lines(loop: Mapping[str, Any]) -> list[str]:
    """Return the result as lines for the terminal."""
    lines = [
        f"round {row['round']}, {row['choose']:<6} {row['rows']:>8,} rows  "
        f"{'' if row['dollars'] is None else money(row['dollars']):>10}  {interval_text(row)}"
        for row in loop["rounds"]
    ]
    lines.append(f"base {interval_text(loop['base'])}, teacher {interval_text(loop['teacher'])}")
    lines += [f"round {row['round']}: hard - random {difference_text(row)}" for row in loop["differences"]]
    lines += [f"note: {line}" for line in notes(loop)]
    lines.append(verdict_text(loop))
    return lines


def page(loop: Mapping[str, Any], name: str) -> str:
    """Return loop.html.

    Args:
        name: of the student.
    """
    arms = list(dict.fromkeys(row["choose"] for row in loop["rounds"]))
    kinds = dict(zip(arms, ("one", "two"), strict=False))
    lines = []
    for arm in arms:
        rows = [row for row in loop["rounds"] if row["choose"] == arm]
        measured = [Measured(row["rows"], row["score"], row["low"], row["high"]) for row in rows]
        path = [(row["rows"], row["score"]) for row in rows]
        lines.append(Line(f"{arm} prompts", kinds[arm], measured, path if len(path) > 1 else ()))
    levels = {"base": loop["base"]["score"], "teacher": loop["teacher"]["score"]}
    ticks = sorted({row["rows"] for row in loop["rounds"] if row["choose"] == arms[0]})
    last = loop["rounds"][len(loop["rounds"]) // len(arms) - 1]
    differences = loop["differences"]
    tiles = [
        (score_text(last["score"], "accuracy"), f"accuracy after round {last['round']}"),
        (f"{last['rows']:,}", "rows paid for"),
        ("–" if last["dollars"] is None else money(last["dollars"]), "what they cost"),
    ]
    if differences:
        tiles.append((difference_text(differences[-1]), "more than with random prompts"))
    return Page(
        title=f"Loop of {name}",
        lead=f"{last['round']} rounds, scored on {loop['held_out']['scored']:,} prompts of the split "
        f"{loop['held_out']['split']}",
        verdict=verdict_text(loop),
        stops=bool(differences) and differences[-1]["low"] <= 0,
        tiles=tiles,
        plot_title="Accuracy by rows paid for, one point a round, with 95 % intervals",
        plot=plot(
            lines,
            Axis("rows", "{:,.0f}".format, ticks),
            Axis("accuracy", lambda value: f"{100 * value:.4g} %"),
            levels,
        ),
        legend=[(kinds[arm], f"{arm} prompts") for arm in arms] if len(arms) > 1 else (),
        notes=notes(loop),
        tables=[_rounds_table(loop), *([_differences_table(loop)] if differences else [])],
    ).render()


def _rounds_table(loop: Mapping[str, Any]) -> Table:
    columns = ["chosen", "round", "rows", "learned", "dollars", "failed", "accuracy, 95 % interval"]
    rows = [
        [
            row["choose"],
            str(row["round"]),
            f"{row['rows']:,}",
            f"{row['learned']:,}",
            "–" if row["dollars"] is None else money(row["dollars"]),
            f"{row['failed']:,} of {row['asked']:,}" if row["asked"] else "–",
            interval_text(row),
        ]
        for row in loop["rounds"]
    ]
    return Table("Rounds", columns, rows)


def _differences_table(loop: Mapping[str, Any]) -> Table:
    rows = [[str(row["round"]), difference_text(row)] for row in loop["differences"]]
    return Table("Hard minus random prompts", ["round", "difference, 95 % interval"], rows)

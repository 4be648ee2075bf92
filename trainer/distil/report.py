"""Say what a distillation made: lines for the terminal, and distil.html."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from trainer.experiments.curve_report import money, steps_made
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, plot
from trainer.files import write_report

_MODELS = ("base", "student", "teacher")


def write(facts: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    """Write distil.html and distil.json into a folder; return their paths.

    Raises:
        StoreError: the disk refuses.
    """
    return write_report(folder, "distil", page(facts, folder), facts)


def results(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what each stage did, by its name."""
    return {stage["stage"]: stage["result"] for stage in facts["stages"]}


def describe(name: str, made: Mapping[str, Any]) -> str:
    """Say in a line what a stage did."""
    match name:
        case "harvest" if made:
            cost = money(made["cost_microusd"] / 1e6)
            return (
                f"{made['rows_total']:,} rows: {made['answers_stored']:,} answers stored, "
                f"{made['from_cache']:,} already stored, {made['dead']:,} failed, {cost}"
            )
        case "harvest":
            return "the store as it was found"
        case "curate":
            dropped = "".join(f", {count:,} {reason}" for reason, count in made["dropped"].items())
            return f"kept {made['kept']:,} rows, dropped {sum(made['dropped'].values()):,}{dropped}"
        case "plan":
            peak = made["memory"]["peak"] / 2**20
            return f"{made['examples']:,} examples, {made['steps']:,} steps, {peak:,.0f} MiB of memory"
        case "train":
            loss = "" if made["loss"] is None else f", loss {made['loss']:.3f}"
            best = f", adapter of step {made['best_step']:,}" if made["best_step"] else ""
            steps = made["steps"]
            done = steps_made(made)
            of = "" if done == steps else f" of {steps:,}"
            return f"{done:,}{of} steps in {made['wall_s']:,.0f} s{loss}{best}"
        case "evaluate":
            return scores_text(made)
        case "export":
            return f"{made['merged']}, {made['dtype']}"
        case _:
            return str(made["report"])


def scores_text(made: Mapping[str, Any]) -> str:
    """Return the accuracies of base, student and teacher; the losses where nothing can be judged."""
    if made.get("macro"):
        shown = ", ".join(f"{model} {made['macro'][model]['accuracy']:.1%}" for model in _MODELS)
        recovery = "" if made["recovery"] is None else f"; recovery {made['recovery']:.2f}"
        return f"accuracy {shown}{recovery}"
    losses = {model: value for model, value in made.get("loss", {}).items() if value is not None}
    shown = ", ".join(f"{model} {value:.3f}" for model, value in losses.items())
    return f"loss on the teacher's answers {shown}"


def text_lines(facts: Mapping[str, Any]) -> list[str]:
    """Return the result as lines for the terminal."""
    return [
        f"{stage['stage']:<9} {'now' if stage['is_new'] else 'before':<7} "
        f"{describe(stage['stage'], stage['result'])}"
        for stage in facts["stages"]
    ]


def page(facts: Mapping[str, Any], folder: Path) -> str:
    """Return distil.html."""
    made = results(facts)
    last = facts["stages"][-1]["stage"]
    is_complete = last == "report"
    log = Path(made["train"]["adapter"]).parent / "train.jsonl" if "train" in made else None
    return Page(
        title=f"Distillation of {facts['name']}",
        lead=" → ".join(stage["stage"] for stage in facts["stages"]),
        verdict=scores_text(made["evaluate"]) if "evaluate" in made else f"done until {last}",
        stops=not is_complete,
        tiles=_tiles(made),
        plot_title="Loss by step of the training" if log is not None else "Nothing is trained yet",
        plot=_loss_plot(log),
        legend=(),
        notes=list(made["train"]["notes"]) if "train" in made else (),
        tables=[_stage_table(facts), *_files_table(made, folder)],
    ).render()


def _tiles(made: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    tiles = []
    if harvest := made.get("harvest"):
        tiles += [
            (f"{harvest['rows_total']:,}", "rows asked for"),
            (money(harvest["cost_microusd"] / 1e6), "cost of the harvest that completed them"),
        ]
    if "plan" in made:
        tiles.append((f"{made['plan']['examples']:,}", "examples learned"))
    scores = made.get("evaluate", {})
    if scores.get("macro"):
        accuracies = scores["macro"]
        tiles += [(f"{accuracies[model]['accuracy']:.1%}", f"accuracy of the {model}") for model in _MODELS]
    return tiles


def _loss_plot(log: Path | None) -> Markup:
    """Draw the losses of a training log; nothing if it has fewer than two."""
    points = _losses(log) if log is not None else []
    if len(points) < 2:
        return Markup("")
    marks = sorted({points[0][0], points[len(points) // 2][0], points[-1][0]})
    axis = Axis("step", "{:,.0f}".format, marks)
    return plot([Line("loss", "one", path=points)], axis, Axis("nats per token", "{:.3g}".format), {})


def _losses(log: Path) -> list[tuple[float, float]]:
    try:
        lines = log.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"]) for row in rows if isinstance(row.get("loss"), int | float)]


def _stage_table(facts: Mapping[str, Any]) -> Table:
    rows = [
        [
            stage["stage"],
            describe(stage["stage"], stage["result"]),
            f"{stage['seconds']:,.1f}",
            "now" if stage["is_new"] else "before",
        ]
        for stage in facts["stages"]
    ]
    return Table("Stages", ["stage", "what it did", "seconds", "made"], rows)


def _files_table(made: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Table]:
    named: list[tuple[str, str]] = []
    if "report" in made:
        named.append(("the harvest, answers and scorecard", made["report"]["report"]))
    if "evaluate" in made:
        scorecard = Path(made["evaluate"]["scorecard"])
        named.append(("where student and teacher disagree", str(scorecard.with_name("disagreements.html"))))
        named.append(("scorecard", str(scorecard)))
    if "export" in made:
        named.append(("the merged student", made["export"]["merged"]))
    rows: list[Sequence[str]] = [[what, _link(os.path.relpath(path, folder))] for what, path in named]
    return [Table("Files", ["what", "where"], rows)] if rows else []


def _link(path: str) -> Markup:
    return Markup('<a href="{}">{}</a>').format(quote(path), path)

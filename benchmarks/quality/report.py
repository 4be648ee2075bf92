"""Write the results as quality.json and quality.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from benchmarks.quality import cache
from benchmarks.quality.bootstrap import Interval
from benchmarks.quality.experiments import Arm
from benchmarks.quality.gates import Gate
from benchmarks.quality.results import Results
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, Measured, plot

# Parts of the project's tests that prove E12, exactness.
E12 = (
    ("kill and resume to the same bits", "tests/trainer/training/test_torture.py (make torture-trainer)"),
    ("a pack equals its documents alone", "tests/trainer/training/test_exactness.py"),
    ("one by eight equals eight by one and two processes", "tests/trainer/training/test_accumulation.py"),
    ("merged weights equal base and adapter", "tests/trainer/publish/test_export.py"),
)

# Arms with one tokenizer that are drawn by loss and calibration error, those of one teacher together.
SURENESS = ("E2 small", "E5", "E6", "E7", "E13")
UNSURE = ("E2 unsure", "E5 unsure", "E6 unsure")


def write(
    folder: Path,
    results: Results,
    gates: Sequence[Gate],
    arms: Mapping[str, Arm],
    seconds: Mapping[str, float],
) -> Path:
    """Write both files; return the path of the page."""
    facts = {
        "schema": "benchmarks.quality/1",
        **asdict(results),
        "gates": [asdict(gate) for gate in gates],
        "what": {name: arm.what for name, arm in arms.items() if name in results.accuracy},
        "seconds": dict(seconds),
    }
    cache.write_json(folder / "quality.json", facts)
    page = folder / "quality.html"
    page.write_text(_page(results, gates, arms, seconds).render(), encoding="utf-8")
    return page


def table_of(results: Results, arms: Mapping[str, Arm]) -> list[list[str]]:
    """Return a row for each arm: name, what, accuracy, recovery, seeds, loss, calibration error."""
    return [
        [
            name,
            arms[name].what,
            str(results.accuracy[name]),
            str(results.recovery[name]),
            ", ".join(f"{value:.3f}" for value in results.by_seed[name]),
            str(results.loss[name]),
            str(results.error[name]),
        ]
        for name in results.accuracy
    ]


def _page(
    results: Results, gates: Sequence[Gate], arms: Mapping[str, Arm], seconds: Mapping[str, float]
) -> Page:
    missed = [gate for gate in gates if not gate.is_held]
    verdict = "all gates are held" if not missed else f"{len(missed)} of {len(gates)} gates are missed"
    shown, sureness = (
        ("arm", "student", "accuracy", "recovery"),
        ("by seed", "nats a token", "calibration error"),
    )
    rows = table_of(results, arms)
    tables = [
        Table("Gates", ("gate", "measured", "verdict"), [(g.name, g.measured, _word(g)) for g in gates]),
        Table("Students", shown, [row[: len(shown)] for row in rows]),
        Table(
            "Seeds, loss and calibration", ("arm", *sureness), [(row[0], *row[len(shown) :]) for row in rows]
        ),
        *(
            Table(f"Differences: {measure}", ("pair", "difference"), [(k, str(v)) for k, v in pairs.items()])
            for measure, pairs in results.differences.items()
        ),
        *(
            Table(
                f"Split {split}",
                ("arm", *("accuracy", "recovery")),
                [(k, *(str(v.get(x, "")) for x in ("accuracy", "recovery"))) for k, v in of.items()],
            )
            for split, of in results.splits.items()
        ),
        *([_tasks(results)] if "E4" in results.tasks else []),
        *([_loop_table(results)] if results.loop else []),
        *([_kl_table(results)] if results.reverse_kl else []),
        Table("E12: exactness is proved by tests", ("what", "where"), E12),
        Table("Seconds", ("stage", "seconds"), [(k, f"{v:,.0f}") for k, v in seconds.items()]),
    ]
    tiles = [
        (f"{results.recovery[name].value:.3f}", f"{name}: recovery, {arms[name].what}")
        for name in ("E2", "E5", "E4", "E13")
        if name in results.recovery
    ]
    return Page(
        title="What a student recovers of a small neural teacher",
        lead="Tiny models on eight rule tasks; all answers were harvested over HTTP. Intervals are "
        "95 % paired bootstraps over held-out prompts and seeds.",
        verdict=verdict,
        stops=bool(missed),
        tiles=tiles,
        plot_title="Plots",
        plot=Markup("").join(_plots(results)),
        legend=(("one", "all arms; E8: hard prompts; E11: measured"), ("two", "E8: random prompts")),
        notes=tuple(_notes(results, arms)),
        tables=tables,
    )


def _notes(results: Results, arms: Mapping[str, Arm]) -> Iterator[str]:
    yield "Accuracy is the mean over the tasks on contents that teacher and student have never seen."
    if alone := [name for name in results.accuracy if arms[name].has_one_seed]:
        yield (
            f"One seed: {', '.join(alone)}. Compared with that seed of another arm alone, so the interval "
            "holds no noise between seeds."
        )


def _word(gate: Gate) -> str:
    return "held" if gate.is_held else "missed"


def _tasks(results: Results) -> Table:
    rows = [
        (task, *(f"{results.tasks[arm][task][at]:.3f}" for arm, at in (("E4", 1), ("E3", 0), ("E4", 0))))
        for task in results.tasks["E4"]
    ]
    return Table("E4 by task", ("task", "weaker teacher", "E3", "E4"), rows)


def _loop_table(results: Results) -> Table:
    names = list(results.loop)
    rows = [(at, *(str(results.loop[name][at]) for name in names)) for at in results.loop["difference"]]
    return Table("E8: hard prompts against random ones", ("after", *names), rows)


def _kl_table(results: Results) -> Table:
    rows = [(str(at), f"{a:.3f}", f"{b:.3f}") for at, (a, b) in enumerate(results.reverse_kl)]
    return Table("E13: reverse KL on held-out prompts, nats a token", ("seed", "before", "after"), rows)


def _plots(results: Results) -> list[Markup]:
    others = {name: each for name, each in results.recovery.items() if name not in (*SURENESS, *UNSURE)}
    drawn = (
        ("Recovery of the teacher by method", others, "recovery"),
        ("Recovery from few rows, by what is learned", _some(results.recovery, SURENESS), "recovery"),
        ("Calibration error on right answers", _some(results.error, SURENESS), "calibration error"),
        ("Loss on right answers", _some(results.loss, SURENESS), "nats a token"),
        (
            "Calibration error of an unsure teacher's students",
            _some(results.error, UNSURE),
            "calibration error",
        ),
        ("Loss of an unsure teacher's students", _some(results.loss, UNSURE), "nats a token"),
    )
    plots = [_titled(title, _by_arm(values, label)) for title, values, label in drawn if values]
    if results.loop:
        lines = []
        for name, kind in (("hard", "one"), ("random", "two")):
            points = [_measured(at, each) for at, each in enumerate(results.loop[name].values(), start=1)]
            lines.append(Line(name, kind, points, path=[(p.x, p.y) for p in points]))
        rounds = range(1, len(results.loop["hard"]) + 1)
        x = Axis("round", lambda value: f"{value:.0f}", ticks=list(rounds))
        plots.append(_titled("E8: hard prompts against random ones", plot(lines, x, _share("accuracy"), {})))
    if results.curve is not None:
        plots.append(_titled("E11: accuracy by rows", _curve(results.curve)))
    return plots


def _some(values: Mapping[str, Interval], names: Sequence[str]) -> dict[str, Interval]:
    return {name: values[name] for name in names if name in values}


def _by_arm(values: Mapping[str, Interval], label: str) -> Markup:
    names = list(values)
    points = [_measured(at, each) for at, each in enumerate(values.values())]
    x = Axis("", lambda at: names[round(at)].replace(" ", "\n"), ticks=list(range(len(names))))
    return plot([Line(label, "one", points)], x, _share(label), {})


def _curve(facts: Mapping[str, Any]) -> Markup:
    points = [Measured(p["rows"], p["score"], p["low"], p["high"]) for p in facts["points"]]
    fit = [(p["rows"], p["score"]) for p in facts["curve"]]
    band = [(p["rows"], p["low"], p["high"]) for p in facts["curve"]]
    ticks = [p.x for p in points]
    x = Axis("rows", lambda value: f"{value:,.0f}", ticks=ticks, is_log=True)
    return plot([Line("accuracy", "one", points, fit, band)], x, _share("accuracy"), {})


def _share(label: str) -> Axis:
    return Axis(label, lambda value: f"{value:.3g}")


def _measured(at: float, each: Interval) -> Measured:
    return Measured(at, each.value, each.low, each.high)


def _titled(title: str, drawn: Markup) -> Markup:
    return Markup("<h2>{}</h2>{}").format(title, drawn)

"""Check the plots and verdicts of the experiments' pages."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.experiments import curve_report, loop_report
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, Measured, plot, ticks

HOSTILE = "</svg><script>alert(1)</script> & \x1b[31m"


@given(low=st.floats(-1e6, 1e6), size=st.floats(1e-6, 1e6))
def test_ticks_enclose_the_data_and_are_few(low, size):
    at = ticks(low, low + size)
    slack = 1e-6 * max(1.0, abs(low), size)
    assert at[0] <= low + slack
    assert at[-1] >= low + size - slack
    assert 1 <= len(at) <= 10


def drawn(points: list[Measured], *, is_log: bool) -> ElementTree.Element:
    line = Line(HOSTILE, "one", points, [(p.x, p.y) for p in points], [(p.x, p.low, p.high) for p in points])
    x = Axis(HOSTILE, lambda value: f"{value}\n{HOSTILE}", [p.x for p in points], is_log=is_log)
    svg = plot([line], x, Axis(HOSTILE, "{:.3f}".format), {HOSTILE: 0.5})
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_a_plot_is_well_formed_whatever_the_labels_hold(is_log, count):
    root = drawn(
        [Measured(2.0**n, n / 10, n / 10 - 0.05, n / 10 + 0.05) for n in range(count)], is_log=is_log
    )
    circles = root.findall("circle")
    assert len(circles) == count
    assert not root.findall(".//script")
    across = [float(circle.attrib["cx"]) for circle in circles]
    down = [float(circle.attrib["cy"]) for circle in circles]
    assert across == sorted(across)
    assert down == sorted(down, reverse=True)  # a higher score is drawn higher
    if is_log and count > 2:
        steps = [b - a for a, b in pairwise(across)]
        assert steps == pytest.approx([steps[0]] * len(steps), abs=0.2)


def test_a_page_escapes_every_text():
    table = Table(HOSTILE, [HOSTILE], [[HOSTILE]])
    svg = plot([Line("a", "one", [Measured(1, 1, 0, 2)])], Axis("x", str), Axis("y", str), {})
    page = Page(
        **dict.fromkeys(("title", "lead", "verdict", "plot_title"), HOSTILE),
        stops=True,
        tiles=[(HOSTILE, HOSTILE)],
        plot=svg,
        legend=[("one", HOSTILE)],
        notes=[HOSTILE],
        tables=[table],
    )
    text = page.render()
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count("&lt;script&gt;") >= 9


def curve(low: float, *, verdict: str, dollars: float | None = 1.0, smallest: int = 10) -> dict[str, Any]:
    gain = {"value": low + 0.01, "low": low, "high": low + 0.02}
    return {
        "measure": "accuracy",
        "verdict": verdict,
        "held_out": {"smallest_task": smallest},
        "next": {"rows": 500, "dollars": dollars, "gain": gain},
    }


def test_the_verdict_names_the_reason():
    text = curve_report.verdict_text(curve(-0.01, verdict="stop here"))
    assert text.startswith("stop here: the next $1.00 (500 rows)")
    assert "+0.00 points (-1.00 to +1.00), an interval that holds zero" in text
    assert "least gain" in curve_report.verdict_text(curve(0.002, verdict="stop here"))
    text = curve_report.verdict_text(curve(0.01, verdict="go on", dollars=None))
    assert text.startswith("go on: the next 500 rows")
    assert "$" not in text
    assert "can't show" not in text
    few = curve_report.verdict_text(curve(0.01, verdict="go on", smallest=9))
    assert few.endswith(", which 9 held-out prompts can't show")


@pytest.mark.parametrize(("measure", "interval"), [("accuracy", (0.4, 0.5)), ("loss", (0.2, 0.3))])
def test_a_curve_whose_students_are_no_better_than_their_base_says_so(measure, interval):
    low, high = interval
    facts = {
        "measure": measure,
        "steps": "equal",
        "seeds": [0, 1],
        "base": 0.3 if measure == "accuracy" else 0.35,
        "points": [{"low": low, "high": high}],
        "price": {"dollars_per_row": 0.001, "rows": 9, "unpriced": 0},
        "fit": {"scatter": 0.0},
        "prediction": {"rows": 9, "predicted": 0.5, "measured": 0.5, "error": 0.0},
        "held_out": {"prompts": 8, "scored": 8, "smallest_task": 8},
    }
    assert any("8 held-out prompts" in line and "too few" in line for line in curve_report.notes(facts))
    facts["held_out"] = {"prompts": 10, "scored": 10, "smallest_task": 10}
    assert not any("too few" in line for line in curve_report.notes(facts))
    word = "no size scores clearly better"
    assert not any(word in line for line in curve_report.notes(facts))
    worse = facts | {"base": 0.45 if measure == "accuracy" else 0.25}
    assert any(word in line for line in curve_report.notes(worse))


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.03, "teach more"), (-0.03, -0.01, "teach less"), (-0.01, 0.01, "no difference shown")],
)
def test_the_verdict_of_a_loop_follows_the_interval(low, high, words):
    difference = {"round": 3, "value": (low + high) / 2, "low": low, "high": high}
    assert words in loop_report.verdict_text({"differences": [difference]})


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "$0.00"), (12.345, "$12.35"), (0.5, "$0.5"), (3.5625e-6, "$0.00000356")]
)
def test_small_amounts_keep_three_digits(value, text):
    assert curve_report.money(value) == text

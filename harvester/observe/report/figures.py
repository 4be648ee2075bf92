"""Build the charts of a harvest from the statistics of its answers and from trace.jsonl."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby, pairwise
from typing import Any

from harvester.observe.report import charts
from harvester.observe.report.answer_statistics import AnswerStatistics
from harvester.observe.report.charts import Series

Point = Mapping[str, Any]
MOST_STRETCHES = 100
IDLE_SHARE = 0.02
NOTHING_HELD = "no delay"


def figure(
    title: str, drawing: Any, note: str = "", legend: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Return a drawing with its heading; `legend` pairs classes of the style sheet with words."""
    return {"title": title, "drawing": drawing, "note": note, "legend": list(legend)}


class TimelineCurves:
    """Curves over running time, from trace.jsonl; the time between two runs becomes a narrow gap."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.runs = [list(run) for _, run in groupby(points, key=lambda point: point.get("run_id"))]
        busy_s = sum(run[-1]["at"] - run[0]["at"] for run in self.runs)
        gap_s = max(1e-3, busy_s * IDLE_SHARE)
        self._starts: list[tuple[float, float]] = []
        x = 0.0
        for run in self.runs:
            self._starts.append((x, run[0]["at"]))
            x += run[-1]["at"] - run[0]["at"] + gap_s
        self._span_s = busy_s

    @property
    def marks(self) -> list[float]:
        """Where a run begins, on the x axis."""
        return [x - 1e-3 for x, _ in self._starts[1:]]

    def clock(self, x: float) -> str:
        """Return the UTC time at a place on the x axis."""
        start = max((start for start in self._starts if start[0] <= x + 1e-6), default=(0.0, 0.0))
        at = datetime.fromtimestamp(start[1] + x - start[0], UTC)
        return f"{at:%H:%M:%S}" if self._span_s < 3600 and len(self.runs) == 1 else f"{at:%b %d, %H:%M}"

    def _stretches(self) -> Iterator[tuple[float, Point, Point] | None]:
        """Neighbouring points (of one run), with the x of the later; None between runs."""
        total = sum(len(run) for run in self.runs)
        group = math.ceil(total / MOST_STRETCHES)
        for (x, began), run in zip(self._starts, self.runs, strict=True):
            chosen = [*run[:-1:group], run[-1]]
            for before, after in pairwise(chosen):
                yield x + after["at"] - began, before, after
            yield None

    def rate(self, name: str, per_s: float = 1.0) -> list[tuple[float, float] | None]:
        """Return growth of a count, in units per `per_s` seconds."""
        curve: list[tuple[float, float] | None] = []
        for stretch in self._stretches():
            if stretch is None:
                curve.append(None)
                continue
            x, before, after = stretch
            span_s = max(after["at"] - before["at"], 1e-3)
            curve.append((x, max(0.0, (after.get(name, 0) - before.get(name, 0)) / span_s * per_s)))
        return curve

    def level(self, value: Callable[[Point], float | None]) -> list[tuple[float, float] | None]:
        """Return a value of each point; None where there is none."""
        curve: list[tuple[float, float] | None] = []
        for stretch in self._stretches():
            level = None if stretch is None else value(stretch[2])
            curve.append(None if stretch is None or level is None else (stretch[0], float(level)))
        return curve

    def total(self, name: str, scale: float = 1.0) -> list[tuple[float, float] | None]:
        """Return a count, added up over all runs."""
        curve: list[tuple[float, float] | None] = []
        before, last = 0.0, 0.0
        for stretch in self._stretches():
            if stretch is None:
                before += last
                last = 0.0
                continue
            last = float(stretch[2].get(name, 0))
            curve.append((stretch[0], (before + last) * scale))
        return curve

    def waits(self) -> Counter[str]:
        """Return seconds by what delayed the next request."""
        waits: Counter[str] = Counter()
        for run in self.runs:
            for before, after in pairwise(run):
                waits[reason(after.get("waiting", ""))] += after["at"] - before["at"]
        return waits


def reason(waiting: str) -> str:
    """Return the text of `waiting` without its numbers, so that times of the same cause add up."""
    if waiting.startswith("window of "):
        return "window of requests in flight"
    return re.sub(r", \d+ s$", "", waiting) or NOTHING_HELD


def rate_charts(course: TimelineCurves, statistics: AnswerStatistics) -> list[dict[str, Any]]:
    """Return charts of rate and limit, requests in flight and window, causes of delay, and cost."""
    if not any(len(run) > 2 for run in course.runs):
        return [_rate_from_answers(statistics)]
    peak = max((point[1] for point in course.rate("stored") if point), default=0.0)
    per_s, unit = (1.0, "s") if peak >= 1 else (60.0, "min")
    stored, refused = course.rate("stored", per_s), course.rate("limited", per_s)
    limit = course.level(
        lambda p: None if p.get("requests_per_minute") is None else p["requests_per_minute"] / 60 * per_s
    )
    series = [Series("answers", stored, "one", area=True)]
    legend = [("one", f"answers stored per {unit}")]
    note = ""
    if any(refused_point and refused_point[1] for refused_point in refused):
        series.append(Series("refusals", refused, "bad"))
        legend.append(("bad", f"refused for the rate per {unit}"))
    highest = max((point[1] for point in limit if point), default=0.0)
    if highest and highest <= 4 * peak * per_s:
        series.append(Series("limit", limit, "limit"))
        legend.append(("limit", "request limit in force"))
    elif highest:
        note = f"The request limit, {charts.compact(highest)} per {unit}, is off the scale."
    drawn = [
        figure("Rate and limit", charts.lines(series, x=course.clock, marks=course.marks), note, legend),
        figure(
            "Requests in flight",
            charts.lines(
                [
                    Series("in flight", course.level(lambda p: p.get("in_flight")), "one", area=True),
                    Series("window", course.level(lambda p: p.get("window")), "limit"),
                ],
                x=course.clock,
                marks=course.marks,
            ),
            legend=[("one", "requests in flight"), ("limit", "window allowed")],
        ),
        figure("What delayed requests", charts.shares(course.waits(), duration), "Time by reason."),
    ]
    if statistics.cost_microusd:
        cost = Series("cost", course.total("microusd", 1e-6), "two", area=True)
        drawn.append(
            figure("Cost so far", charts.lines([cost], x=course.clock, y=charts.dollars, marks=course.marks))
        )
    return drawn


def _rate_from_answers(statistics: AnswerStatistics) -> dict[str, Any]:
    """Answers per second from their own times, for a store without trace.jsonl."""
    rates = statistics.timeline.rates()
    drawing = charts.lines([Series("answers", rates, "one", area=True)], x=_clock)
    note = "From the times of the answers: there is no trace.jsonl." if statistics.rows else ""
    return figure("Answers per second", drawing, note)


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%b %d, %H:%M:%S}"


def answer_charts(statistics: AnswerStatistics, errors: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return charts of latency, tokens, endings and errors."""
    endings = "Finish reasons, and outcomes that differ from them."
    drawn = [
        figure(
            "Latency",
            charts.histogram(statistics.latency_ms, format=charts.milliseconds),
            "Send to last byte, of the attempt that answered.",
        ),
        figure(
            "Tokens of an answer", charts.histogram(statistics.tokens_out, unit="tokens", whole_numbers=True)
        ),
        figure(
            "Tokens of a prompt", charts.histogram(statistics.tokens_in, unit="tokens", whole_numbers=True)
        ),
        figure("How answers ended", charts.shares(_endings(statistics)), endings),
    ]
    if errors:
        drawn.append(
            figure("Errors met", charts.shares(errors), "Attempts, not rows; most were tried again.")
        )
    return drawn


def _endings(statistics: AnswerStatistics) -> Counter[str]:
    """Finish reasons, and outcomes that a finish reason does not tell."""
    usual = {"ok": "stop", "truncated": "length", "filtered": "content_filter", "tool_call": "tool_calls"}
    endings = Counter({name or "(none)": count for name, count in statistics.finish_reasons.items()})
    for outcome, count in statistics.outcomes.items():
        if usual.get(outcome, "") not in statistics.finish_reasons:
            endings[f"{outcome} (outcome)"] += count
    return endings


def drift_chart(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how far the canaries' answers are from the first ones, round by round."""
    curve = [(float(row["at"]), float(row["distance"])) for row in rounds if row.get("distance") is not None]
    marks = [float(row["at"]) for row in rounds if row.get("changes")]
    drawing = charts.lines(
        [Series("distance", curve, "three", area=True)], x=_clock, marks=marks, width=charts.WIDE
    )
    return figure("Canaries: distance from the reference", drawing, "0: the same words; 1: none in common.")


def process_charts(course: TimelineCurves) -> list[dict[str, Any]]:
    """Return charts of the harvester's own memory and event-loop delay."""
    memory = course.level(lambda p: p["rss_bytes"] / 2**20 if p.get("rss_bytes") else None)
    lag = course.level(lambda p: p["loop_lag_s"] * 1000 if p.get("loop_lag_s") is not None else None)
    return [
        figure(
            "Memory of the process, MiB",
            charts.lines([Series("memory", memory, "three", area=True)], x=course.clock, marks=course.marks),
        ),
        figure(
            "Longest delay of the event loop",
            charts.lines(
                [Series("lag", lag, "three", area=True)],
                x=course.clock,
                y=charts.milliseconds,
                marks=course.marks,
            ),
        ),
    ]


def between(low: float, high: float) -> str:
    """Return a range of seconds, in one unit where it has one."""
    first, last = duration(low), duration(high)
    (number, unit), other = first.split(" "), last.split(" ")[1]
    return f"{number}–{last}" if unit == other else f"{first} – {last}"


def duration(seconds: float) -> str:
    """Return seconds in the unit that fits."""
    for size, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"

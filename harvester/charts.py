"""Small SVG drawings for the report: numbers in, markup out, nothing remote, nothing executable.

Every label is escaped here, so callers may pass a teacher's words. Colours are CSS variables of the
page, so the drawings follow its light and dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 560


@dataclass(frozen=True, slots=True)
class Interval:
    """A point with its confidence limits, all as shares in [0, 1]."""

    accuracy: float
    low: float
    high: float


def compact(value: float) -> str:
    """A number short enough for an axis: 950, 1.2k, 3.4M; small ones keep two significant digits."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def histogram(values: Sequence[float], *, unit: str, bins: int = 32) -> Markup:
    """Counts of `values` in equal bins up to the 99.5th percentile; the tail is summed into the last bin."""
    if not values:
        return Markup('<p class="none">nothing measured yet</p>')
    ordered = sorted(values)
    low, top = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    high = top
    if all(value == int(value) for value in ordered) and high - low < 2 * bins:
        bins, high = int(high - low) + 1, high + 1  # whole numbers in a small range: one bin each
    width = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in ordered:
        counts[min(bins - 1, int((value - low) / width))] += 1
    height, base = 120, 132
    step = WIDTH / bins
    tallest = max(counts)
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{base - count / tallest * height:.1f}" width="{step - 2:.1f}" '
        f'height="{count / tallest * height:.1f}" rx="1.5"><title>{count} from {compact(low + i * width)} '
        f"{escape(unit)}</title></rect>"
        for i, count in enumerate(counts)
        if count
    )
    middle = ordered[len(ordered) // 2]
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    axis = (
        f'<line class="axis" x1="0" x2="{WIDTH}" y1="{base}" y2="{base}"/>'
        f'<text x="0" y="{base + 16}">{compact(low)}</text>'
        f'<text x="{WIDTH}" y="{base + 16}" text-anchor="end">{compact(top)} {escape(unit)}</text>'
        f'<text x="{WIDTH / 2}" y="{base + 16}" text-anchor="middle">median {compact(middle)}, '
        f"95 % below {compact(p95)}</text>"
    )
    return _svg(f'<g class="bars">{bars}</g>{axis}', base + 22, f"histogram in {unit}")


def shares(counts: Mapping[str, int]) -> Markup:
    """One horizontal bar a name, longest first, labelled with count and share."""
    total = sum(counts.values())
    if not total:
        return Markup('<p class="none">nothing to count</p>')
    rows = sorted(counts.items(), key=lambda item: -item[1])
    parts = []
    for i, (name, count) in enumerate(rows):
        y = i * 24
        length = max(2.0, count / rows[0][1] * 300)
        parts.append(
            f'<text class="name" x="150" y="{y + 14}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect class="bar" x="160" y="{y + 3}" width="{length:.1f}" height="14" rx="2"/>'
            f'<text x="{168 + length:.1f}" y="{y + 14}">{count:,} ({count / total:.1%})</text>'
        )
    return _svg("".join(parts), len(rows) * 24 + 4, "counts by name")


def accuracies(tasks: Mapping[str, Mapping[str, Interval]], who: Sequence[str]) -> Markup:
    """A dot with its interval for each of `who`, one band a task, on a 0..100 % axis."""
    left, right, band = 130, WIDTH - 24, 20 + 12 * len(who)
    span = right - left
    parts = []
    for tick in range(0, 101, 25):
        x = left + span * tick / 100
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{band * len(tasks)}"/>'
            f'<text x="{x:.1f}" y="{band * len(tasks) + 16}" text-anchor="middle">{tick} %</text>'
        )
    for row, (task, scores) in enumerate(tasks.items()):
        top = row * band
        parts.append(
            f'<text class="name" x="{left - 12}" y="{top + band / 2 + 4}" text-anchor="end">'
            f"{escape(_short(task))}</text>"
        )
        for place, name in enumerate(who):
            score = scores[name]
            y = top + 14 + 12 * place
            x, low, high = (left + span * value for value in (score.accuracy, score.low, score.high))
            parts.append(
                f'<g class="who-{escape(name)}"><line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
                f'<circle cx="{x:.1f}" cy="{y}" r="4.5"/><title>{escape(task)}, {escape(name)}: '
                f"{score.accuracy:.1%} ({score.low:.1%} to {score.high:.1%})</title></g>"
            )
    return _svg("".join(parts), band * len(tasks) + 24, "accuracy with 95 % intervals")


def line(points: Sequence[tuple[float, float]], *, x_unit: str, y_unit: str) -> Markup:
    """A polyline of (x, y); y starts at 0."""
    if len(points) < 2:
        return Markup('<p class="none">too few points to draw</p>')
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, top, base = 44, 8, 136
    span_x, tallest = (max(xs) - min(xs)) or 1.0, max(ys) or 1.0
    path = " ".join(
        f"{left + (x - min(xs)) / span_x * (WIDTH - left - 8):.1f},{base - y / tallest * (base - top):.1f}"
        for x, y in points
    )
    axis = (
        f'<line class="axis" x1="{left}" x2="{WIDTH}" y1="{base}" y2="{base}"/>'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{compact(tallest)}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{left}" y="{base + 16}">{compact(min(xs))} {escape(x_unit)}</text>'
        f'<text x="{WIDTH}" y="{base + 16}" text-anchor="end">{compact(max(xs))} {escape(x_unit)}</text>'
    )
    return _svg(f'{axis}<polyline points="{path}"/>', base + 22, f"{y_unit} over {x_unit}")


def _svg(inside: str, height: float, label: str) -> Markup:
    return Markup(  # noqa: S704 - every caller escapes its text above
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{inside}</svg>'
    )


def _short(name: str, limit: int = 18) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"

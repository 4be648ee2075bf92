"""Draw small SVG charts for the pages: lines, histograms and shares, without scripts or remote parts.

Every label is escaped here, so callers may pass text that a teacher wrote. Colours are CSS classes of the
page's style sheet, so the charts follow its light and dark theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from harvester.observe.report.histogram import Histogram, edge
from harvester.system.safe_text import one_line

WIDTH, WIDE = 400, 560
LEFT, TOP, BASE = 44, 10, 150
# An axis that would end outside these bounds ends at 1: its ticks would underflow to 0 or overflow.
SMALLEST_AXIS, LARGEST_AXIS = 1e-300, 1e300
MOST_BARS = 40
MOST_POINTS = 400
Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart: `kind` is its class in the style sheet; None breaks the line."""

    name: str
    points: Sequence[tuple[float, float] | None]
    kind: str = "one"
    area: bool = False


def compact(value: float) -> str:
    """Return a number short enough for an axis: 950, 1.2k, 3.4M; small ones keep three significant digits."""
    if value == 0:
        return "0"
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Return a duration given in milliseconds, in the unit that fits."""
    for limit, suffix in ((60_000.0, "min"), (1000.0, "s"), (1.0, "ms")):
        if value >= limit * 0.9995:
            return f"{value / limit:.3g} {suffix}"
    return f"{value:.2g} ms" if value else "0"


def dollars(value: float) -> str:
    """Return US dollars: cents where they matter, more digits where it is less, down to a micro-dollar."""
    if value >= 0.1 or value == 0:
        return f"${value:,.2f}"
    return f"${value:.2g}" if value >= 1e-4 else f"${value:.6f}"


def words(text: str) -> Markup:
    """Escape text for a label: one line, control and invisible characters made visible."""
    return escape(one_line(text))


def nothing(why: str) -> Markup:
    """Return a note in place of a chart."""
    return Markup('<p class="none">{}</p>').format(words(why))


def ticks(high: float, most: int = 4) -> list[float]:
    """Round numbers from 0 to at least `high`, at most about `most` + 1 of them."""
    if not SMALLEST_AXIS <= high <= LARGEST_AXIS:
        return [0.0, 1.0]
    raw = high / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10, 20) if power * factor >= raw * 0.999999)
    return [step * i for i in range(math.ceil(high / step * 0.999999) + 1)]


def lines(
    series: Sequence[Series],
    *,
    x: Format = compact,
    y: Format = compact,
    marks: Sequence[float] = (),
    width: int = WIDTH,
) -> Markup:
    """Draw lines over a common x axis; y starts at 0. NaN and infinities are gaps.

    Args:
        x, y: write the numbers of the axes.
        marks: x values that get a vertical rule.
        width: of the drawing, in its own units.
    """
    series = [replace(curve, points=[_finite(point) for point in curve.points]) for curve in series]
    drawn = [point for curve in series for point in curve.points if point is not None]
    if len(drawn) < 2:
        return nothing("too few points to draw")
    low, high = min(p[0] for p in drawn), max(p[0] for p in drawn)
    at = ticks(max(p[1] for p in drawn))
    half_span, tallest = (high / 2 - low / 2) or 1.0, at[-1]  # halves: their difference can't overflow

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = LEFT + (point[0] / 2 - low / 2) / half_span * (width - LEFT - 6)
        return across, BASE - min(1.0, max(0.0, point[1] / tallest)) * (BASE - TOP)

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{width}" y1="{v:.1f}" y2="{v:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{words(y(tick))}</text>'
        for tick in at
        for v in [place((low, tick))[1]]
    ]
    parts += [
        f'<line class="mark" x1="{place((m, 0))[0]:.1f}" x2="{place((m, 0))[0]:.1f}" y1="{TOP}" y2="{BASE}"/>'
        for m in marks
        if low < m < high
    ]
    for curve in series:
        for piece in _pieces(curve.points):
            dots = [place(point) for point in piece]
            path = " ".join(f"{across:.1f},{down:.1f}" for across, down in dots)
            if curve.area:
                corners = f"{dots[0][0]:.1f},{BASE} {path} {dots[-1][0]:.1f},{BASE}"
                parts.append(f'<polygon class="area {curve.kind}" points="{corners}"/>')
            parts.append(f'<polyline class="{curve.kind}" points="{path}"/>')
    parts.append(
        f'<text x="{LEFT}" y="{BASE + 18}">{words(x(low))}</text>'
        f'<text x="{width}" y="{BASE + 18}" text-anchor="end">{words(x(high))}</text>'
    )
    return svg("".join(parts), BASE + 24, " and ".join(curve.name for curve in series), width)


def _finite(point: tuple[float, float] | None) -> tuple[float, float] | None:
    """The point, or None (a gap) where it can't be drawn."""
    return point if point is not None and all(map(math.isfinite, point)) else None


def _pieces(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Split at the gaps and thin out: of each group of points the highest is kept, so peaks stay visible."""
    group = max(1, math.ceil(len(points) / MOST_POINTS))
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [
        [max(piece[i : i + group], key=lambda p: p[1]) for i in range(0, len(piece), group)]
        for piece in pieces
        if piece
    ]


def histogram(
    values: Histogram, *, unit: str = "", format: Format = compact, whole_numbers: bool = False
) -> Markup:
    """Return bars on a logarithmic axis, with the median and the 95th percentile named below.

    Args:
        whole: the values are whole numbers; where they lie close together each gets a bar of its own.
    """
    if not values.count:
        return nothing("nothing measured yet")
    bars = (_whole_bars(values) if whole_numbers else None) or _log_bars(values)
    step = min(34.0, WIDTH / len(bars))
    tallest = max(count for _, count in bars)
    parts = [f'<line class="axis" x1="0" x2="{WIDTH}" y1="{BASE}" y2="{BASE}"/>']
    parts += [
        _bar(i * step, step, count / tallest, f"{count:,} from {format(low)} {unit}".rstrip())
        for i, (low, count) in enumerate(bars)
        if count
    ]
    parts += _labels(bars, step, format, whole_numbers=whole_numbers)
    middle, most = (values.quantile(share) for share in (0.5, 0.95))
    if whole_numbers:
        middle, most = float(round(middle)), float(round(most))
    label = f"median {format(middle)}, 95 % below {format(most)} {unit}".rstrip()
    parts.append(f'<text x="{WIDTH}" y="{BASE + 40}" text-anchor="end">{words(label)}</text>')
    return svg("".join(parts), BASE + 46, f"histogram: {label}")


def _whole_bars(values: Histogram) -> list[tuple[float, int]] | None:
    """One bar for each number; None if a value is above 39, where a cell no longer holds a single number."""
    numbers = range(0 if values.zeros else 1, 40)
    cells = {value: Histogram.cell(value) for value in numbers if value}
    if not set(values.cells) <= set(cells.values()):
        return None
    bars = [(float(v), values.cells[cells[v]] if v else values.zeros) for v in numbers]
    held = [i for i, (_, count) in enumerate(bars) if count]
    return bars[held[0] : held[-1] + 1]


def _log_bars(values: Histogram) -> list[tuple[float, int]]:
    """At most `MOST_BARS` bars of equal width on a logarithmic scale; outliers go into the outermost."""
    ordered = sorted(values.cells) or [0]
    low, high = ordered[0], ordered[-1]
    if values.count >= 500:  # the outermost thousandth must not squeeze everybody else
        low, high = (Histogram.cell(values.quantile(share)) for share in (0.001, 0.999))
    group = max(4, math.ceil((high - low + 1) / MOST_BARS))
    number = max(1, math.ceil((high - low + 1) / group))
    counts = [0] * number
    for cell, count in values.cells.items():
        counts[min(number - 1, max(0, (cell - low) // group))] += count
    bars = [(edge(low + i * group), count) for i, count in enumerate(counts)]
    return [(0.0, values.zeros), *bars] if values.zeros else bars


def _labels(
    bars: Sequence[tuple[float, int]], step: float, format: Format, *, whole_numbers: bool
) -> list[str]:
    """Numbers below the bars: each whole one, or round ones at their place on the logarithmic axis."""
    places = {low: (i + 0.5) * step for i, (low, _) in enumerate(bars)}
    if not whole_numbers or any(low != int(low) for low in places):
        edges = [(low, i * step) for i, (low, _) in enumerate(bars) if low > 0]
        places = {0.0: step / 2} if bars[0][0] == 0 else {}
        (low, start), octaves = edges[0], math.log2(edges[1][0] / edges[0][0]) if len(edges) > 1 else 1.0
        for power in range(math.floor(math.log10(low)), 20):
            for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
                x = start + math.log2(value / low) / octaves * step
                if start <= x <= len(bars) * step:
                    places[value] = x
    parts, free_from = [], 0.0
    for value, x in places.items():
        text = format(value)
        half = 3.4 * len(text)
        if x - half >= free_from - 1 and x + half <= WIDTH + 4:
            parts.append(f'<text x="{x:.1f}" y="{BASE + 18}" text-anchor="middle">{words(text)}</text>')
            free_from = x + half + 10
    return parts


def _bar(x: float, width: float, share: float, title: str) -> str:
    height = max(1.0, share * (BASE - TOP))
    return (
        f'<rect class="bar" x="{x + 0.75:.1f}" y="{BASE - height:.1f}" width="{max(1.0, width - 1.5):.1f}" '
        f'height="{height:.1f}" rx="1.5"><title>{words(title)}</title></rect>'
    )


def shares(counts: Mapping[str, float], format: Format = "{:,.0f}".format, most: int = 9) -> Markup:
    """Return one horizontal bar a name, longest first, labelled with its amount and share."""
    rows = sorted(((name, count) for name, count in counts.items() if count > 0), key=lambda item: -item[1])
    if not rows:
        return nothing("nothing to count")
    total = sum(count for _, count in rows)
    if len(rows) > most:
        rows = [*rows[: most - 1], (f"{len(rows) - most + 1} others", sum(c for _, c in rows[most - 1 :]))]
    parts = []
    for i, (name, count) in enumerate(rows):
        y, length = i * 36, max(3.0, count / rows[0][1] * WIDTH)
        label = f"{format(count)} ({count / total:.1%})"
        parts.append(
            f'<text class="name" x="0" y="{y + 12}"><title>{words(name)}</title>'
            f"{words(short(name, 36))}</text>"
            f'<text x="{WIDTH}" y="{y + 12}" text-anchor="end">{words(label)}</text>'
            f'<rect class="bar" x="0" y="{y + 18}" width="{length:.1f}" height="8" rx="2"/>'
        )
    return svg("".join(parts), len(rows) * 36 - 6, "counts by name")


def svg(inside: str, height: float, label: str, width: int = WIDTH) -> Markup:
    """Wrap escaped markup in an SVG element that scales to its place; `label` is read by screen readers."""
    return Markup(  # noqa: S704 - every caller escapes its text above
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{words(label)}">{inside}</svg>'
    )


def short(name: str, limit: int = 20) -> str:
    """Return a name cut to `limit` characters."""
    return name if len(name) <= limit else name[: limit - 1] + "…"

"""Draw scores with intervals as one SVG, without scripts or remote parts.

Colours are CSS classes of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from harvester.system.safe_text import one_line

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 44, 24, 66
# With more numbers on the horizontal axis a plot keeps its width on a phone, and is moved sideways.
MOST_TICKS_ON_A_PHONE = 6
# Steps between ticks, times a power of ten.
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
Format = Callable[[float], str]
Place = Callable[[float], float]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured point with its 95 % interval."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the plot.

    Attributes:
        kind: its class in the style sheet.
        measured: points with intervals.
        path: points joined by a line; empty: none is drawn.
        band: (x, low, high) of an interval around the line.
    """

    name: str
    kind: str
    measured: Sequence[Measured] = ()
    path: Sequence[Point] = ()
    band: Sequence[tuple[float, float, float]] = ()


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers that enclose [low, high], about `most` of them."""
    raw = max(high - low, 1e-9) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in _STEPS if power * factor >= raw * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label, and how its numbers are written, in one line or (the horizontal axis) two.

    Attributes:
        ticks: where it has numbers; empty: at round ones around the data.
        is_log: logarithmic; all values must be above 0.
    """

    label: str
    format: Format
    ticks: Sequence[float] = ()
    is_log: bool = False


def plot(lines: Sequence[Line], x: Axis, y: Axis, levels: Mapping[str, float]) -> Markup:
    """Draw lines with points and intervals, and horizontal levels such as the teacher's score.

    Args:
        levels: heights of dashed lines, by their names.
    """
    across = math.log if x.is_log else float
    xs = [across(value) for line in lines for value in _xs(line)] + [across(tick) for tick in x.ticks]
    ys = [value for line in lines for value in _ys(line)] + list(levels.values())
    left, right = min(xs), max(xs)
    at = ticks(min(ys), max(ys))

    def place_x(value: float) -> float:
        share = (across(value) - left) / (right - left or 1.0)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        share = (value - at[0]) / (at[-1] - at[0] or 1.0)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(place_y(tick), y.format(tick)) for tick in at]
    parts += [_x_number(place_x(tick), x.format(tick)) for tick in x.ticks]
    parts += [_drawn(line, place_x, place_y) for line in lines]
    parts += [_level(name, place_y(height), y.format(height)) for name, height in levels.items()]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label, "middle"))
    parts.append(_text(LEFT, 12, y.label, "start"))
    names = ", ".join(line.name for line in lines)
    kind = "wide" if len(x.ticks) > MOST_TICKS_ON_A_PHONE else "narrow"
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        kind, WIDTH, HEIGHT, _plain(f"{y.label} by {x.label}: {names}"), Markup("").join(parts)
    )


def _level(name: str, y: float, text: str) -> Markup:
    line = Markup('<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    label = _text(WIDTH - RIGHT, y - 5, f"{name} {text}", "end")
    return line.format(LEFT, WIDTH - RIGHT, y, y) + label


def _plain(text: str) -> Markup:
    return escape(one_line(text))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, _plain(text))


def _grid(y: float, text: str) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    return line.format(LEFT, WIDTH - RIGHT, y, y) + _text(LEFT - 8, y + 4, text, "end")


def _x_number(x: float, text: str) -> Markup:
    tick = Markup('<line class="grid" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>')
    lines = [
        _text(x, HEIGHT - BOTTOM + 19 + 15 * number, line, "middle")
        for number, line in enumerate(text.split("\n"))
    ]
    return tick.format(x, x, HEIGHT - BOTTOM, HEIGHT - BOTTOM + 5) + Markup("").join(lines)


def _drawn(line: Line, place_x: Place, place_y: Place) -> Markup:
    parts = []
    if line.band:
        upper = [(place_x(x), place_y(high)) for x, _, high in line.band]
        lower = [(place_x(x), place_y(low)) for x, low, _ in reversed(line.band)]
        band = Markup('<polygon class="band {}" points="{}"/>')
        parts.append(band.format(line.kind, _joined(upper + lower)))
    if line.path:
        path = _joined([(place_x(x), place_y(y)) for x, y in line.path])
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(line.kind, path))
    for each in line.measured:
        x = place_x(each.x)
        parts.append(
            Markup(
                '<line class="interval {0}" x1="{1:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{3:.1f}"/>'
                '<circle class="point {0}" cx="{1:.1f}" cy="{4:.1f}" r="4"/>'
            ).format(line.kind, x, place_y(each.low), place_y(each.high), place_y(each.y))
        )
    return Markup("").join(parts)


def _joined(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _xs(line: Line) -> list[float]:
    return [m.x for m in line.measured] + [x for x, _ in line.path] + [x for x, _, _ in line.band]


def _ys(line: Line) -> list[float]:
    measured = [y for m in line.measured for y in (m.low, m.high)]
    return measured + [y for _, y in line.path] + [y for _, low, high in line.band for y in (low, high)]

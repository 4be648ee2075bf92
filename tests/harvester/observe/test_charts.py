"""Test the charts: right marks, every label escaped, no division by zero."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harvester.observe.report import charts, scorecard
from harvester.observe.report.charts import Series
from harvester.observe.report.histogram import Histogram

HOSTILE = '"><script>alert(1)</script>&\x1b[31m\u202e'
names = st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"]))


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing))


def of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.note(value)
    return histogram


@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=600))
def test_a_histogram_counts_every_value_once(values: list[float]):
    drawn = parsed(charts.histogram(of(values), unit="ms"))
    counts = [int((rect.find("title").text or "0").split()[0]) for rect in drawn.iter("rect")]
    assert sum(counts) == len(values)


@given(st.lists(st.integers(0, 39), min_size=1, max_size=100))
def test_small_whole_numbers_get_a_bar_each(values: list[int]):
    drawn = parsed(charts.histogram(of([float(v) for v in values]), whole_numbers=True))
    bars = [(rect.find("title").text or "").split(" from ") for rect in drawn.iter("rect")]
    assert {int(value): int(count) for count, value in bars} == {v: values.count(v) for v in set(values)}


@given(st.dictionaries(names, st.integers(1, 10**6), min_size=1, max_size=9))
def test_names_never_become_markup(counts: dict[str, int]):
    drawing = charts.shares(counts)
    assert len(list(parsed(drawing).iter("rect"))) == len(counts)


def test_a_hostile_name_stays_text():
    shares = str(charts.shares({HOSTILE: 3}))
    interval = {"base": scorecard.Interval(0.1, 0.0, 0.2)}
    card = str(scorecard.accuracies({HOSTILE: interval}, ["base"]))
    for drawing in (shares, card, str(charts.nothing(HOSTILE))):
        assert "<script" not in drawing
        assert "\x1b" not in drawing
        assert "\u202e" not in drawing
    assert card.count("<circle") == 1


usual = st.tuples(st.floats(0, 1e9), st.floats(0, 1e12))
# Denormal and huge numbers, zero and huge spans, NaN and infinities.
extreme = st.tuples(st.floats(), st.floats())


@given(st.lists(usual | st.none(), max_size=900) | st.lists(extreme | usual | st.none(), max_size=20))
@example([(0.0, 0.0), (0.0, 5e-324)])
@example([(-1.7e308, 1.7e308), (1.7e308, -1.7e308)])
@example([(0.0, math.nan), (1.0, math.inf), (2.0, 1.0), (3.0, 1.0)])
@example([(5e-324, 0.0), (1e-323, 1e300)])
def test_lines_stay_inside_their_frame(points: list[tuple[float, float] | None]):
    drawing = charts.lines([Series("a", points, area=True)])
    if sum(point is not None and all(map(math.isfinite, point)) for point in points) < 2:
        assert "too few" in drawing
        return
    for line in parsed(drawing).iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert charts.LEFT - 1 <= x <= charts.WIDTH
            assert charts.TOP - 1 <= y <= charts.BASE + 1


def test_a_gap_breaks_the_line():
    drawn = parsed(charts.lines([Series("a", [(0, 1), (1, 2), None, (5, 1), (6, 1)])]))
    assert len(list(drawn.iter("polyline"))) == 2


@pytest.mark.parametrize("high", [1e-300, 0.0003, 0.9, 1, 7, 10, 99, 101, 12345, 1e9, 1e300])
def test_ticks_are_few_and_reach_the_top(high: float):
    ticks = charts.ticks(high)
    assert ticks[0] == 0
    assert ticks[-1] >= high * 0.999
    assert 2 <= len(ticks) <= 6


def test_a_chart_without_data_says_so():
    assert "nothing" in charts.histogram(Histogram())
    assert "nothing" in charts.shares({})
    assert "too few" in charts.lines([Series("a", [(0, 1)])])
    assert charts.ticks(math.nan) == [0.0, 1.0]


def test_numbers_stay_short():
    assert [charts.compact(v) for v in (0, 0.01234, 12.34, 950, 1234, 999_900, 3_400_000)] == [
        "0",
        "0.0123",
        "12.3",
        "950",
        "1.23k",
        "1M",
        "3.4M",
    ]
    assert [charts.milliseconds(v) for v in (0, 0.5, 86, 1200, 90_000)] == [
        "0",
        "0.5 ms",
        "86 ms",
        "1.2 s",
        "1.5 min",
    ]
    assert [charts.dollars(v) for v in (0, 0.0195, 3.5, 1234.5)] == ["$0.00", "$0.019", "$3.50", "$1,234.50"]

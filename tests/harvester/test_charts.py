"""Drawings: right marks, every label escaped, no division by nothing."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from harvester import charts

HOSTILE = '"><script>alert(1)</script>&\x1b[31m'


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing))


@given(st.lists(st.floats(min_value=0, max_value=1e9), min_size=1, max_size=200))
def test_a_histogram_counts_every_value_once(values: list[float]):
    drawn = parsed(charts.histogram(values, unit="ms"))
    counts = [int((rect.find("title").text or "0").split()[0]) for rect in drawn.iter("rect")]
    assert sum(counts) == len(values)


@given(
    st.dictionaries(
        st.text(min_size=1, alphabet=st.characters(min_codepoint=32, max_codepoint=0xD7FF)),
        st.integers(1, 10**6),
        min_size=1,
        max_size=8,
    )
)
def test_names_never_become_markup(counts: dict[str, int]):
    drawing = charts.shares(counts)
    assert len(list(parsed(drawing).iter("rect"))) == len(counts)


def test_a_hostile_name_stays_text():
    drawing = charts.shares({HOSTILE.replace("\x1b", ""): 3})
    assert "<script" not in drawing
    assert charts.accuracies({"t": {"base": charts.Interval(0.1, 0.0, 0.2)}}, ["base"]).count("<circle") == 1


def test_nothing_to_draw_is_said():
    assert "nothing" in charts.histogram([], unit="s")
    assert "nothing" in charts.shares({})
    assert "too few" in charts.line([(0, 1)], x_unit="s", y_unit="n")


def test_numbers_stay_short():
    assert [charts.compact(v) for v in (0, 0.01234, 12.34, 950, 1234, 3_400_000)] == [
        "0", "0.0123", "12.3", "950", "1.23k", "3.4M",
    ]  # fmt: skip

"""Test the statistics of a corpus: exact counts, bounded histograms, the same however it is divided."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from harvester.observe.report import answer_statistics
from harvester.observe.report.histogram import MOST_BUCKETS, Histogram, TimeBuckets, step_for
from harvester.store.reader import Corpus
from harvester.store.shards import seal
from tests.harvester import store_rows


def build(store: Path, cuts: tuple[int, ...], count: int) -> None:
    with store_rows.open_store(store) as journal:
        for number in range(count):
            raw = json.loads(store_rows.raw_of(number))
            raw["choices"][0]["finish_reason"] = "length" if number % 10 == 0 else "stop"
            journal.apply([store_rows.intent(number)])
            journal.apply(
                [
                    store_rows.answer(
                        number,
                        raw=json.dumps(raw).encode(),
                        outcome="truncated" if number % 10 == 0 else "ok",
                        latency_s=0.01 * (number + 1),
                        output_tokens=number % 7,
                        cost_microusd=number,
                    )
                ]
            )
            if number in cuts:
                seal.seal(journal, store, target_bytes=1 << 20, everything=True)


def test_answer_statistics_agrees_with_the_rows(tmp_path: Path):
    build(tmp_path / "s", (29, 69), 100)
    statistics, shown = answer_statistics.statistics_of_store(tmp_path / "s")
    samples = list(Corpus.open(tmp_path / "s").samples())
    assert statistics.rows == len(samples) == 100
    assert statistics.output_tokens == sum(s.output_tokens for s in samples)
    assert statistics.cost_microusd == sum(range(100))
    assert statistics.outcomes == {"truncated": 10, "ok": 90}
    assert statistics.finish_reasons == {"length": 10, "stop": 90}
    assert statistics.facts["response_model"] == {"mock-2026": 100}
    assert (
        statistics.timeline.buckets.total()
        == statistics.latency_ms.count
        == statistics.tokens_out.count
        == 100
    )
    assert statistics.tokens_out.zeros == 15
    assert {s.key for s in shown} == {s.key for s in samples}
    by_key = {s.key: s for s in samples}
    assert all(
        s.completion == by_key[s.key].completion and s.messages == by_key[s.key].messages for s in shown
    )


def test_it_is_the_same_however_the_store_is_cut(tmp_path: Path):
    build(tmp_path / "one", (99,), 100)
    build(tmp_path / "many", (3, 40, 41, 90), 100)
    build(tmp_path / "none", (), 100)
    taken = [answer_statistics.statistics_of_store(tmp_path / name) for name in ("one", "many", "none")]
    for statistics, shown in taken[1:]:
        assert [s.key for s in shown] == [s.key for s in taken[0][1]]
        for name in ("rows", "outcomes", "facts", "latency_ms", "tokens_out", "timeline", "cost_microusd"):
            assert getattr(statistics, name) == getattr(taken[0][0], name)


def test_rare_outcomes_are_shown_and_the_rest_is_bounded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(answer_statistics, "SHOWN", 20)
    monkeypatch.setattr(answer_statistics, "SHOWN_OTHER", 4)
    build(tmp_path / "s", (29, 69), 100)
    _, shown = answer_statistics.statistics_of_store(tmp_path / "s")
    assert sorted(s.outcome for s in shown) == ["ok"] * 20 + ["truncated"] * 4
    keys = sorted(s.key for s in Corpus.open(tmp_path / "s").samples() if s.outcome == "ok")
    assert [s.key for s in shown if s.outcome == "ok"] == keys[:20]


def test_a_reader_that_comes_back_reads_only_what_is_new(tmp_path: Path):
    store = tmp_path / "s"
    build(store, (49,), 60)
    known: answer_statistics.ShardStatistics = {}
    first, _ = answer_statistics.statistics_of_store(store, known)
    (name,) = known
    known[name].rows += 1000  # had it been read again, this would be gone
    again, _ = answer_statistics.statistics_of_store(store, known)
    assert again.rows == first.rows + 1000


@given(st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=300), st.floats(0, 1))
def test_a_quantile_is_off_by_little(values: list[float], share: float):
    histogram = Histogram()
    for value in values:
        histogram.note(value)
    exact = sorted(values)[min(len(values) - 1, math.floor(share * len(values)))]
    assert exact / 1.012 <= histogram.quantile(share) <= exact * 1.012


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=200), st.integers(1, 199))
def test_timelines_add_up_and_stay_small(times: list[int], cut: int):
    def of(some: list[int]) -> TimeBuckets:
        line = TimeBuckets()
        if some:
            step = step_for(max(some) - min(some))
            counts: dict[int, int] = {}
            for at in some:
                counts[at // step] = counts.get(at // step, 0) + 1
            line.note(counts, step)
        return line

    complete, parts = of(times), of(times[:cut])
    parts.add(of(times[cut:]))
    assert parts.buckets.total() == complete.buckets.total() == len(times)
    assert len(parts.buckets) <= MOST_BUCKETS
    assert sum(y for _, y in parts.rates()) * parts.step_us / 1e6 > 0

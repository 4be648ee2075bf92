"""Compute statistics over all answers of a store, shard by shard, in bounded memory.

Each answer is counted once, under the prompt that paid for it. The answers to show are a fair sample: of each
outcome those with the lowest keys, which are hashes; so rare outcomes are shown too.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harvester.observe.report import groups
from harvester.observe.report.histogram import CELLS_PER_OCTAVE, LEAST, Histogram, TimeBuckets, step_for
from harvester.store.journal.checksums import translate_value_errors
from harvester.store.journal.records import ShardEntry
from harvester.store.reader import Corpus
from harvester.store.shards.proved import open_entry
from harvester.store.shards.schema import Sample, to_table
from harvester.store.shards.swap import hold_for_reading

# At most this many answers are shown of the outcome `ok`, and of each other outcome.
SHOWN, SHOWN_OTHER = 400, 40
ROWS_PER_TABLE = 2048
# Columns with few different values, counted by value.
FACTS = (
    "endpoint",
    "request_model",
    "response_model",
    "system_fingerprint",
    "terms_id",
    "tool_version",
    "run_id",
)
# Columns that are read of every row: small ones, and the metadata of prompts.
_LIGHT = (
    "key",
    "finish_reason",
    "latency_s",
    "input_tokens",
    "created_at",
    "mock",
    *groups.COLUMNS,
    *FACTS,
)
# Columns that are read only of the answers to show.
TEXTS = (
    "key",
    "prompt_id",
    "messages",
    "completion",
    "reasoning",
    "refusal",
    "tool_calls_json",
    "reference",
    "outcome",
    "finish_reason",
    "latency_s",
    "input_tokens",
    "output_tokens",
    "cost_microusd",
    "created_at",
    "response_model",
    "run_id",
    "source_file",
    "source_line",
)
# At most this many different values of a fact are counted.
_MOST_FACTS = 50


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where an answer lies: `shard` names its file; "" is the journal, and then `row` says nothing."""

    key: str
    shard: str = field(compare=False)
    row: int = field(compare=False)


@dataclass(slots=True)
class AnswerStatistics:
    """Counts, sums, histograms, and the places of the answers to show."""

    rows: int = 0
    mock: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_microusd: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in FACTS})
    latency_ms: Histogram = field(default_factory=Histogram)
    tokens_in: Histogram = field(default_factory=Histogram)
    tokens_out: Histogram = field(default_factory=Histogram)
    timeline: TimeBuckets = field(default_factory=TimeBuckets)
    by_group: groups.Groups = field(default_factory=groups.Groups)
    shown: dict[str, list[Place]] = field(default_factory=dict)

    def add(self, other: AnswerStatistics) -> None:
        """Add the statistics of other answers, which must not count the same answers."""
        for name in ("rows", "mock", "input_tokens", "output_tokens", "cost_microusd"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.outcomes.update(other.outcomes)
        self.finish_reasons.update(other.finish_reasons)
        for name, counts in other.facts.items():
            self.facts[name].update(counts)
            while len(self.facts[name]) > _MOST_FACTS:  # a teacher that names another build each time
                self.facts[name].pop(min(self.facts[name], key=self.facts[name].__getitem__))
        self.latency_ms.add(other.latency_ms)
        self.tokens_in.add(other.tokens_in)
        self.tokens_out.add(other.tokens_out)
        self.timeline.add(other.timeline)
        self.by_group.add(other.by_group)
        for outcome, places in other.shown.items():
            mine = self.shown.get(outcome, [])
            self.shown[outcome] = heapq.nsmallest(_most(outcome), [*mine, *places])


# File name of a sealed shard -> its statistics. Shards never change, so a later reading can reuse them.
ShardStatistics = dict[str, AnswerStatistics]


def statistics_of_store(
    store: Path, known: ShardStatistics | None = None
) -> tuple[AnswerStatistics, list[Sample]]:
    """Return the statistics of a store, and the answers to show, lowest key first.

    Raises:
        StoreError, StoreCorrupt: a file is missing or is not what was sealed.
    """
    corpus = Corpus.open(store)
    known = {} if known is None else known
    total = AnswerStatistics()
    journalled: dict[str, Sample] = {}
    with hold_for_reading(corpus.folder), translate_value_errors(corpus.folder):
        with corpus.snapshot(tuple({*_LIGHT, *TEXTS})) as (manifest, tail):
            waiting: list[Sample] = []
            for sample in tail:
                waiting.append(sample)
                if len(waiting) == ROWS_PER_TABLE:
                    _add_journalled(total, journalled, waiting)
                    waiting = []
            _add_journalled(total, journalled, waiting)
        for name in set(known) - {entry.name for entry in manifest}:  # merged into another since
            del known[name]
        for entry in manifest:
            if entry.name not in known:
                with open_entry(corpus.folder, entry) as file:
                    known[entry.name] = statistics_of(file.read(columns=list(_LIGHT)), entry.name)
            total.add(known[entry.name])
        entries = {entry.name: entry for entry in manifest}
        return total, _fetch(total, journalled, corpus.folder, entries)


def _add_journalled(total: AnswerStatistics, journalled: dict[str, Sample], waiting: list[Sample]) -> None:
    if not waiting:
        return
    total.add(statistics_of(to_table(waiting), ""))
    wanted = {place.key for places in total.shown.values() for place in places if not place.shard}
    journalled.update((sample.key, sample) for sample in waiting)
    for key in journalled.keys() - wanted:
        del journalled[key]


def statistics_of(table: pa.Table, shard: str) -> AnswerStatistics:
    """Return the statistics of one table of the contract's schema."""
    statistics = AnswerStatistics(
        rows=table.num_rows,
        mock=_sum(table["mock"]),
        input_tokens=_sum(table["input_tokens"]),
        output_tokens=_sum(table["output_tokens"]),
        cost_microusd=_sum(table["cost_microusd"]),
        outcomes=_counts(table["outcome"]),
        finish_reasons=_counts(table["finish_reason"]),
        facts={name: _counts(table[name]) for name in FACTS},
        latency_ms=_histogram(pc.multiply(table["latency_s"], 1000.0)),
        tokens_in=_histogram(table["input_tokens"]),
        tokens_out=_histogram(table["output_tokens"]),
    )
    if table.num_rows:
        at_us = pc.cast(table["created_at"], pa.int64())
        bounds = pc.min_max(at_us).as_py()
        step = step_for(bounds["max"] - bounds["min"])
        statistics.timeline.note(_counts(pc.divide(at_us, step)), step)
    statistics.by_group.add_table(table)
    light = table.select(["key", "outcome"]).append_column("row", pa.array(range(table.num_rows)))
    for outcome in statistics.outcomes:
        rows = light.filter(pc.equal(light["outcome"], outcome))
        chosen = pc.select_k_unstable(
            rows, k=min(_most(outcome), rows.num_rows), sort_keys=[("key", "ascending")]
        )
        statistics.shown[outcome] = [
            Place(row["key"], shard, row["row"]) for row in rows.take(chosen).to_pylist()
        ]
    return statistics


def _fetch(
    total: AnswerStatistics, journalled: Mapping[str, Sample], folder: Path, entries: Mapping[str, ShardEntry]
) -> list[Sample]:
    """The answers to show, with their texts: a row group is read once, however many are in it."""
    samples = dict(journalled)
    by_shard: dict[str, list[Place]] = {}
    for places in total.shown.values():
        for place in places:
            if place.shard:
                by_shard.setdefault(place.shard, []).append(place)
    for shard, places in by_shard.items():
        with open_entry(folder, entries[shard]) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                rows = [place.row - start for place in places if start <= place.row < end]
                if rows:
                    table = file.read_row_group(group, columns=list(TEXTS)).take(pa.array(rows))
                    samples.update((row["key"], Sample(**row)) for row in table.to_pylist())
                start = end
    wanted = sorted(place.key for places in total.shown.values() for place in places)
    return [samples[key] for key in wanted if key in samples]


def _most(outcome: str) -> int:
    return SHOWN if outcome == "ok" else SHOWN_OTHER


def _sum(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py() or 0)


def _counts(column: pa.ChunkedArray) -> Counter[Any]:
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()})


def _histogram(column: pa.ChunkedArray) -> Histogram:
    values = pc.cast(column, pa.float64())
    positive = pc.filter(values, pc.greater(values, 0))
    octaves = pc.log2(pc.max_element_wise(positive, LEAST))
    cells = pc.cast(pc.floor(pc.multiply(octaves, float(CELLS_PER_OCTAVE))), pa.int64())
    return Histogram(_counts(cells), len(values) - len(positive))

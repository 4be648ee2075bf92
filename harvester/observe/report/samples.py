"""Show answers on the pages: search every answer of a store, and prepare single ones for display.

A search goes from the newest answer to the oldest. It returns a page of matches with a cursor for the next
page, and stops after `PATIENCE_S` seconds even if the page is not full.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harvester.observe.report import charts
from harvester.observe.report.answer_statistics import TEXTS, AnswerStatistics
from harvester.store.journal.records import ShardEntry
from harvester.store.reader import Corpus
from harvester.store.shards.proved import open_entry
from harvester.store.shards.schema import Sample
from harvester.store.shards.swap import hold_for_reading

# Characters of one text on a page; the corpus holds all of it.
TEXT_SHOWN = 4000
LONGEST_QUERY = 200
PAGE = 50
# Seconds after which a page of matches is returned as it is; its cursor tells where to continue.
PATIENCE_S = 2.0

_TAIL = "journal"
_NUMBER = re.compile(r"[0-9]{1,15}")


def samples_view(statistics: AnswerStatistics, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the answers of the page, and the outcomes to filter them by."""
    return {
        "samples": [sample_view(sample) for sample in samples],
        "outcomes": [name for name, _ in statistics.outcomes.most_common()],
        "total_samples": f"{statistics.rows:,}",
    }


def sample_view(sample: Sample) -> dict[str, Any]:
    """Return one answer for display; a text that was cut says how much is missing."""
    prompt = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in sample.messages)
    further = [
        ("reasoning", sample.reasoning),
        ("refusal", sample.refusal),
        ("tool calls", sample.tool_calls_json),
        ("reference", sample.reference),
    ]
    facts = [
        ("prompt", f"{sample.prompt_id} ({sample.source_file}:{sample.source_line})"),
        ("finish reason", sample.finish_reason or "(none)"),
        ("tokens", f"{sample.input_tokens:,} in, {sample.output_tokens:,} out"),
        ("latency", charts.milliseconds(sample.latency_s * 1000)),
        ("cost", charts.dollars(sample.cost_microusd / 1e6)),
        ("answered", f"{sample.created_at:%Y-%m-%d %H:%M:%S} UTC by {sample.response_model or '(unnamed)'}"),
        ("run", sample.run_id),
        ("key", sample.key),
    ]
    return {
        "prompt": _cut(prompt),
        "completion": _cut(sample.completion or ""),
        "outcome": sample.outcome,
        "tokens": f"{sample.output_tokens:,}",
        "further": [(name, _cut(text)) for name, text in further if text],
        "facts": facts,
    }


def _cut(text: str) -> str:
    left = len(text) - TEXT_SHOWN
    return text if left <= 0 else f"{text[:TEXT_SHOWN]}… ({left:,} more characters in the corpus)"


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A page of matches; `cursor` is "" at the end of the store, else the start of the next page."""

    samples: list[Sample]
    cursor: str
    looked_at: int


def search(store: Path, text: str, *, outcome: str = "", cursor: str = "") -> SearchResult:
    """Find answers whose prompt, completion, reasoning or id contains `text` (any case), with this `outcome`.

    Args:
        cursor: that of the previous page; an unknown one starts from the beginning.

    Raises:
        StoreError, StoreCorrupt: a file is missing or is not what was sealed.
    """
    corpus = Corpus.open(store)
    with hold_for_reading(corpus.folder):
        return _search(corpus, text[:LONGEST_QUERY], outcome, cursor)


def _search(corpus: Corpus, wanted: str, outcome: str, cursor: str) -> SearchResult:
    until = time.monotonic() + PATIENCE_S
    with corpus.snapshot(TEXTS) as (manifest, tail):
        entries = list(reversed(manifest))
        shard, group, row = _start(cursor, [entry.name for entry in entries])
        result = SearchResult([], "", 0)
        if shard < 0:
            result = _search_journal(tail, wanted, outcome, row)
            shard, group, row = 0, 0, 0
    if result.cursor:
        return result
    return _search_shards(corpus.folder, entries[shard:], wanted, outcome, (group, row), result, until)


def _search_journal(tail: Iterator[Sample], wanted: str, outcome: str, skipped: int) -> SearchResult:
    """Return the page of matches among unsealed answers after those that earlier pages had."""
    samples: list[Sample] = []
    matches = looked_at = 0
    for sample in tail:
        looked_at += 1
        if not _matches(sample, wanted, outcome):
            continue
        if len(samples) == PAGE:
            return SearchResult(samples, f"{_TAIL}:0:{skipped + PAGE}", looked_at)
        matches += 1
        if matches > skipped:
            samples.append(sample)
    return SearchResult(samples, "", looked_at)


def _search_shards(  # noqa: PLR0913 - what is searched, for what, from where, until when
    folder: Path,
    entries: Sequence[ShardEntry],
    wanted: str,
    outcome: str,
    start: tuple[int, int],
    before: SearchResult,
    until: float,
) -> SearchResult:
    """Add the matches of shards to a page.

    Args:
        start: row group and row of the first shard to start at.
        before: what was found in the journal.
        until: monotonic seconds after which the page is returned as it is.
    """
    samples, looked_at = list(before.samples), before.looked_at
    first_group, row = start
    for entry in entries:
        with open_entry(folder, entry) as file:
            for group in range(first_group, file.num_row_groups):
                if len(samples) >= PAGE or (time.monotonic() > until and looked_at):
                    return SearchResult(samples, f"{entry.name}:{group}:{row}", looked_at)
                table = file.read_row_group(group, columns=list(TEXTS)).slice(row)
                rows = _rows(table, wanted, outcome)
                free = PAGE - len(samples)
                chosen = table.take(pa.array(rows[:free], pa.int64()))
                samples += [Sample(**values) for values in chosen.to_pylist()]
                if len(rows) > free:
                    cursor = f"{entry.name}:{group}:{row + rows[free]}"
                    return SearchResult(samples, cursor, looked_at + rows[free])
                looked_at += table.num_rows
                row = 0
        first_group = 0
    return SearchResult(samples, "", looked_at)


def _start(cursor: str, names: list[str]) -> tuple[int, int, int]:
    """Shard (-1: the journal), row group and row to start at."""
    name, _, rest = cursor.partition(":")
    group, _, row = rest.partition(":")
    if name in (_TAIL, *names) and _NUMBER.fullmatch(group) and _NUMBER.fullmatch(row):
        return (-1 if name == _TAIL else names.index(name)), int(group), int(row)
    return -1, 0, 0


def _matches(sample: Sample, text: str, outcome: str) -> bool:
    low = text.lower()
    parts = [message.get("content") for message in sample.messages]
    parts += [sample.completion, sample.reasoning, sample.prompt_id, sample.key]
    return outcome in {"", sample.outcome} and any(low in str(part or "").lower() for part in parts)


def _rows(table: pa.Table, text: str, outcome: str) -> list[int]:
    """Numbers of the rows that match."""
    if not table.num_rows:
        return []
    table = table.combine_chunks()
    mask = pa.array([not text] * table.num_rows)
    if text:
        for name in ("completion", "reasoning", "prompt_id", "key"):
            mask = pc.or_(mask, _contains(table[name], text))
        messages = table["messages"].combine_chunks()
        contents = pc.struct_field(pc.list_flatten(messages), "content")
        parents = pc.list_parent_indices(messages).filter(_contains(contents, text))
        mask = pc.or_(mask, pc.is_in(pa.array(range(table.num_rows), pa.int64()), parents.cast(pa.int64())))
    if outcome:
        mask = pc.and_(mask, pc.equal(table["outcome"], outcome))
    matching: list[int] = pc.indices_nonzero(mask).to_pylist()
    return matching


def _contains(column: pa.Array, text: str) -> pa.Array:
    return pc.fill_null(pc.match_substring(column, text, ignore_case=True), False)

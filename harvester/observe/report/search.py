"""Looks through every answer of a store for a text, newest first, a page at a time and never for long."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from harvester.observe.report.census import TEXTS
from harvester.store.reader import Corpus
from harvester.store.shards.parquet_file import open_shard
from harvester.store.shards.schema import Sample
from harvester.store.shards.swap import hold_for_reading, locate

LONGEST_QUERY = 200
PAGE = 50
PATIENCE_S = 2.0
"""After so long the page is handed over as it is; its cursor says where to go on."""

_TAIL = "journal"
_NUMBER = re.compile(r"[0-9]{1,15}")


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A page of matches; `cursor` is "" at the end of the store, else where the next page begins."""

    samples: list[Sample]
    cursor: str
    looked_at: int


def search(store: Path, text: str, *, outcome: str = "", cursor: str = "") -> SearchResult:
    """Answers whose prompt, completion, reasoning or id holds `text` (any case) and that ended as `outcome`.

    Args:
        cursor: of the page before; one that fits no shard of this store begins anew.

    Raises:
        StoreError, StoreCorrupt: a file is missing or is not what was sealed.
    """
    corpus = Corpus.open(store)
    with hold_for_reading(corpus.folder):
        return _search(corpus, text[:LONGEST_QUERY], outcome, cursor)


def _search(corpus: Corpus, wanted: str, outcome: str, cursor: str) -> SearchResult:
    until = time.monotonic() + PATIENCE_S
    page = _Page()
    with corpus.snapshot(TEXTS) as (manifest, tail):
        names = [entry.name for entry in reversed(manifest)]
        shard, group, row = _begin(cursor, names)
        if shard < 0:
            matches = itertools.islice(_matching(tail, wanted, outcome, page), row, None)
            page.samples += itertools.islice(matches, PAGE)
            if next(matches, None) is not None:
                return SearchResult(page.samples, f"{_TAIL}:0:{row + PAGE}", page.looked_at)
            shard, group, row = 0, 0, 0
    for number in range(shard, len(names)):
        with open_shard(locate(corpus.folder, names[number])) as file:
            for at in range(group, file.num_row_groups):
                if len(page.samples) >= PAGE or (time.monotonic() > until and page.looked_at):
                    return SearchResult(page.samples, f"{names[number]}:{at}:{row}", page.looked_at)
                table = file.read_row_group(at, columns=list(TEXTS)).slice(row)
                rows = _rows(table, wanted, outcome)
                room = PAGE - len(page.samples)
                page.samples += [
                    Sample(**one) for one in table.take(pa.array(rows[:room], pa.int64())).to_pylist()
                ]
                if len(rows) > room:
                    page.looked_at += rows[room]
                    return SearchResult(
                        page.samples, f"{names[number]}:{at}:{row + rows[room]}", page.looked_at
                    )
                page.looked_at += table.num_rows
                row = 0
        group = 0
    return SearchResult(page.samples, "", page.looked_at)


class _Page:
    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.looked_at = 0


def _begin(cursor: str, names: list[str]) -> tuple[int, int, int]:
    """Shard (-1: the journal's tail), row group and row to begin at."""
    name, _, rest = cursor.partition(":")
    group, _, row = rest.partition(":")
    if name in (_TAIL, *names) and _NUMBER.fullmatch(group) and _NUMBER.fullmatch(row):
        return (-1 if name == _TAIL else names.index(name)), int(group), int(row)
    return -1, 0, 0


def _matching(tail: Iterator[Sample], text: str, outcome: str, page: _Page) -> Iterator[Sample]:
    low = text.lower()
    for sample in tail:
        page.looked_at += 1
        parts = [m.get("content") for m in sample.messages]
        parts += [sample.completion, sample.reasoning, sample.prompt_id, sample.key]
        if outcome in {"", sample.outcome} and any(low in str(part or "").lower() for part in parts):
            yield sample


def _rows(table: pa.Table, text: str, outcome: str) -> list[int]:
    """Numbers of the rows that match."""
    if not table.num_rows:
        return []
    table = table.combine_chunks()
    mask = pa.array([not text] * table.num_rows)
    if text:
        for name in ("completion", "reasoning", "prompt_id", "key"):
            mask = pc.or_(mask, _holds(table[name], text))
        messages = table["messages"].combine_chunks()
        contents = pc.struct_field(pc.list_flatten(messages), "content")
        parents = pc.list_parent_indices(messages).filter(_holds(contents, text))
        mask = pc.or_(mask, pc.is_in(pa.array(range(table.num_rows), pa.int64()), parents.cast(pa.int64())))
    if outcome:
        mask = pc.and_(mask, pc.equal(table["outcome"], outcome))
    found: list[int] = pc.indices_nonzero(mask).to_pylist()
    return found


def _holds(column: pa.Array, text: str) -> pa.Array:
    return pc.fill_null(pc.match_substring(column, text, ignore_case=True), False)

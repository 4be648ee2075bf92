"""Corpus -> filters -> curated corpus, with a tally of reasons.

The curated corpus is a folder of shards of the same contract, one or more per lineage, so whatever reads
a corpus reads it too, and every row still names its teacher and terms.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from harvester import doors
from harvester.config import read_toml
from harvester.corpus import Corpus
from harvester.errors import ConfigError, StoreError
from harvester.filters import Filter, chain, named
from harvester.schema import Sample, to_table
from harvester.shard_file import sync_folder, writer_of

ROWS_PER_GROUP = 4096


@dataclass(frozen=True, slots=True)
class Tally:
    """How many samples were kept, and how many were dropped for each reason."""

    kept: int
    dropped: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CurateConfig:
    """A curate.toml: `corpus` and `out` are paths beside the file, `filters` a list of names or tables."""

    corpus: Path
    out: Path
    filters: tuple[Filter, ...]


def load(path: Path) -> CurateConfig:
    """Read curate.toml.

    Raises:
        ConfigError: missing or broken file, unknown key or filter.
    """
    data = read_toml(path, "a curate.toml needs corpus, out and [[filters]]")
    unknown = set(data) - {"corpus", "out", "filters"}
    if unknown or not {"corpus", "out"} <= set(data):
        raise ConfigError(
            f"unknown keys {sorted(unknown)}" if unknown else "'corpus' and 'out' are needed",
            place=str(path),
            remedy='corpus = "store", out = "curated", filters = ["finished", "not_blank"]',
        )
    entries = data.get("filters", ["finished", "not_blank"])
    filters = [named(entry) if isinstance(entry, str) else _from_table(entry, path) for entry in entries]
    return CurateConfig(path.parent / data["corpus"], path.parent / data["out"], tuple(filters))


def _from_table(entry: Any, path: Path) -> Filter:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError("a filter is a name, or one name = value", place=str(path))
    ((name, value),) = entry.items()
    return named(name, value)


def curate(config: CurateConfig) -> Tally:
    """Filter a corpus into a new folder of shards.

    Raises:
        TermsRefused: rows whose lineage is missing or says otherwise.
        StoreError: the target holds shards already (a curated corpus is written once), or can't be written.
    """
    shards = config.out / "shards"
    if shards.exists() and any(shards.glob("*.parquet")):
        raise StoreError("holds a curated corpus already", place=str(shards), remedy="name another 'out'")
    shards.mkdir(parents=True, exist_ok=True)
    corpus = Corpus.open(config.corpus)
    doors.require_lineage(corpus)
    lineages = {str(lineage.get("run_id", "")): lineage for lineage in corpus.lineages()}
    decide = chain(config.filters)
    kept, dropped = 0, Counter[str]()
    with _Writers(shards, lineages) as writers:
        for sample in corpus.samples():
            drop = decide(sample)
            if drop is None:
                writers.add(sample)
                kept += 1
            else:
                dropped[drop.reason] += 1
    tally = Tally(kept, dict(sorted(dropped.items())))
    summary = {"kept": tally.kept, "dropped": tally.dropped, "corpus": str(config.corpus)}
    (config.out / "curation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return tally


class _Writers:
    """One open part per lineage under a hidden name; renamed into place when all rows are in."""

    def __init__(self, folder: Path, lineages: Mapping[str, Mapping[str, Any]]) -> None:
        self._folder = folder
        self._lineages = lineages
        self._open: dict[str, tuple[BinaryIO, pq.ParquetWriter]] = {}
        self._rows: dict[str, list[Sample]] = {}

    def __enter__(self) -> _Writers:
        return self

    def add(self, sample: Sample) -> None:
        rows = self._rows.setdefault(sample.run_id, [])
        rows.append(sample)
        if len(rows) >= ROWS_PER_GROUP:
            self._flush(sample.run_id)

    def _flush(self, run_id: str) -> None:
        if run_id not in self._open:
            sink = self._hidden(len(self._open)).open("wb")
            self._open[run_id] = (sink, writer_of(sink, [self._lineages.get(run_id, {})]))
        _, writer = self._open[run_id]
        writer.write_table(to_table(self._rows.pop(run_id)).cast(writer.schema))

    def _hidden(self, number: int) -> Path:
        return self._folder / f".curated-{number:05d}.parquet.tmp"

    def __exit__(self, kind: object, *_: object) -> None:
        for run_id in list(self._rows) if kind is None else []:
            self._flush(run_id)
        for number, (sink, writer) in enumerate(self._open.values()):
            writer.close()
            sink.flush()
            os.fsync(sink.fileno())
            sink.close()
            if kind is None:
                self._hidden(number).rename(self._folder / f"curated-{number:05d}.parquet")
            else:
                self._hidden(number).unlink()
        sync_folder(self._folder)

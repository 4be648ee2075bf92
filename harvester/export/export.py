"""Export a corpus in formats that other trainers read, under the Hub's file names.

Rows collected for evaluation are never exported for training. The card says so if rows are the mock
teacher's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import ConfigError, StoreError, TermsRefused
from harvester.export.cards.croissant import croissant
from harvester.export.cards.dataset_card import dataset_card
from harvester.export.cards.facts import DatasetFacts, ShardFacts, records_of
from harvester.export.cards.notice import notice
from harvester.export.formats import COLUMNS, SHAPES, Shape, inlined, schema_of, turns_of, unfit
from harvester.store import terms_check
from harvester.store.reader import Corpus
from harvester.store.shards.parquet_file import BYTES_PER_GROUP, ROWS_PER_GROUP, translate_disk_errors
from harvester.system import output_path
from harvester.system.files import sha256_of
from harvester.terms.places import terms_folders
from harvester.terms.records import load_registry

Reasoning = Literal["keep", "inline", "drop"]
ROWS_PER_FILE = 100_000
_COLUMNS = (
    "key",
    "prompt_id",
    "messages",
    "request_json",
    "completion",
    "reasoning",
    "outcome",
    "purpose",
    "metadata_json",
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote (data files, then documents), and how many rows it left out for each reason."""

    rows: int
    files: tuple[Path, ...]
    left_out: Mapping[str, int]


def export(
    store: Path,
    out: Path,
    *,
    shape: Shape = "prompt-completion",
    reasoning: Reasoning = "keep",
    split: str | None = None,
    beside: Path | None = None,
) -> Exported:
    """Write a corpus to a new folder.

    Args:
        split: keep only rows whose metadata `split` equals this; None keeps all.
        beside: a folder with own terms records, besides those found from the store.

    Raises:
        ConfigError: unknown shape, no row to write, or no folder can be made at `out`.
        StoreError: `out` holds files already, the disk refuses, or the store can't be read.
        TermsRefused: the terms of a lineage don't permit it, or rows were collected for evaluation only.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}", remedy=f"one of {', '.join(SHAPES)}")
    output_path.check_folder(out)
    corpus = Corpus.open(store)
    own_terms = [store.resolve().parent, *([beside] if beside is not None else [])]
    terms_check.require_permitted(corpus, "export", *own_terms)
    left_out: dict[str, int] = {}
    with_reasoning = reasoning == "keep" and _has_reasoning(corpus)
    rows = _rows(
        corpus, shape, reasoning if with_reasoning or reasoning != "keep" else "none", split, left_out
    )
    first = next(rows, None)
    if first is None:
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ConfigError(
            f"nothing to export: {f'all rows are left out ({why})' if why else 'the corpus holds no row'}",
            place=str(store),
            remedy="harvest first: `harvester run`" if not why else "`harvester report` shows what came back",
        )
    rows = itertools.chain([first], rows)
    with translate_disk_errors(out):
        if shape in {"prompt-completion", "messages"}:
            files, count = _write_parquet(rows, out, schema_of(shape, with_reasoning=with_reasoning))
        else:
            files, count = _write_jsonl(rows, out)
        documents = _write_documents(corpus, out, files, store.resolve().parent, shape)
    return Exported(count, (*files, *documents), left_out)


def _write_documents(
    corpus: Corpus, out: Path, files: Sequence[Path], beside: Path, shape: Shape
) -> tuple[Path, ...]:
    """README.md (dataset card), NOTICE and croissant.json, from the lineages of the corpus."""
    lineages = tuple(corpus.lineages())
    shards = tuple(
        ShardFacts(str(path.relative_to(out)), sha256_of(path), _rows_in(path), path.stat().st_size)
        for path in files
    )
    dataset = DatasetFacts(
        name=beside.name,
        version="1.0.0",
        url="",
        creator="",
        published=datetime.now(UTC).date(),
        shards=shards,
        lineages=lineages,
        records=records_of(lineages, load_registry(*terms_folders(beside))),
        columns=COLUMNS[shape],
    )
    texts = {
        "README.md": dataset_card(dataset),
        "NOTICE": notice(dataset, title=dataset.name),
        "croissant.json": json.dumps(croissant(dataset), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return tuple(out / name for name in texts)


def _rows_in(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as handle:
        return sum(1 for _ in handle)


def _has_reasoning(corpus: Corpus) -> bool:
    """Return whether an answer to export has reasoning; without any there is no column for it."""
    return any(
        sample.reasoning and sample.outcome == "ok" for sample in corpus.samples(["reasoning", "outcome"])
    )


def _rows(
    corpus: Corpus,
    shape: str,
    reasoning: Reasoning | Literal["none"],
    split: str | None,
    left_out: dict[str, int],
) -> Iterator[dict[str, Any]]:
    for sample in corpus.samples(columns=_COLUMNS):
        if sample.purpose != "train":
            raise TermsRefused(
                "rows collected for evaluation can never be exported for training",
                place=f"row {sample.key[:12]}",
                remedy="keep evaluation harvests in a store of their own",
            )
        turns = turns_of(sample)
        reason = unfit(shape, turns)
        if sample.outcome != "ok" or not sample.completion:
            reason = f"outcome_{sample.outcome}"
        elif split is not None and sample.metadata.get("split") != split:
            reason = "other_split"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        if reasoning == "none" and sample.reasoning:
            raise StoreError(
                "the first answer with reasoning came while this was written",
                place=f"row {sample.key[:12]}",
                remedy="export again, into a new folder",
            )
        if reasoning == "inline":
            sample = inlined(sample)
        yield SHAPES[shape](sample, turns, sample.reasoning if reasoning == "keep" else None)


def _groups(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Group rows into row groups; a group ends with the row that reaches the limit of rows or size."""
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        group.append(row)
        turns = itertools.chain.from_iterable(side for side in row.values() if isinstance(side, list))
        size += sum(len(text or "") for turn in turns for text in turn.values())
        if len(group) >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_parquet(
    rows: Iterator[dict[str, Any]], out: Path, schema: pa.Schema
) -> tuple[tuple[Path, ...], int]:
    """Write Parquet files; they get their `train-xxxxx-of-yyyyy` names once their number is known."""
    data = out / "data"
    output_path.folder(data)
    groups = _groups(rows)
    hidden: list[Path] = []
    total = 0
    for first in groups:
        hidden.append(data / f".train-{len(hidden):05d}.tmp")
        with pq.ParquetWriter(hidden[-1], schema, compression="zstd", write_page_checksum=True) as writer:
            count = 0
            for group in itertools.chain([first], groups):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                count += len(group)
                if count >= ROWS_PER_FILE:
                    break
        total += count
    names = [data / f"train-{i:05d}-of-{len(hidden):05d}.parquet" for i in range(len(hidden))]
    for path, name in zip(hidden, names, strict=True):
        path.rename(name)
    return tuple(names), total


def _write_jsonl(rows: Iterator[dict[str, Any]], out: Path) -> tuple[tuple[Path, ...], int]:
    output_path.folder(out)
    hidden, path, count = out / ".train.jsonl.tmp", out / "train.jsonl", 0
    with hidden.open("w", encoding="utf-8") as handle:
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the last value is the count
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    hidden.rename(path)
    return (path,), count

"""Export a corpus in formats that other trainers read, under the Hub's file names.

Rows that their metadata `split` holds out are written to files of their own (`split_files`). Rows collected
for evaluation are never exported for training. The card says so if rows are the mock teacher's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq

from harvester.errors import ConfigError, StoreError, TermsRefused
from harvester.export.cards.croissant import croissant
from harvester.export.cards.curation import curation_lines, decontamination_line
from harvester.export.cards.dataset_card import dataset_card
from harvester.export.cards.facts import DatasetFacts, ShardFacts, records_of
from harvester.export.cards.notice import notice
from harvester.export.decontaminate import HITS_NAME, RowLeaks
from harvester.export.formats import COLUMNS, SHAPES, Shape, asked_of, inlined, schema_of, unfit
from harvester.export.split_files import JsonlFiles, ParquetFiles, file_split
from harvester.quality.similarity.settings import DecontaminateSection
from harvester.store import terms_check
from harvester.store.mixing import COLUMNS as MIXING_COLUMNS
from harvester.store.mixing import Mixing
from harvester.store.reader import Corpus
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.store.shards.schema import Sample
from harvester.store.where import Where
from harvester.system import output_path
from harvester.system.files import sha256_of
from harvester.terms.places import terms_folders
from harvester.terms.records import load_registry

Reasoning = Literal["keep", "inline", "drop"]
_COLUMNS = (
    "key",
    "prompt_id",
    "messages",
    "request_json",
    "completion",
    "reasoning",
    "tool_calls_json",
    "outcome",
    "purpose",
    "metadata_json",
)


@dataclass(frozen=True, slots=True)
class RowChoice:
    """Which rows are written.

    Attributes:
        split: only rows whose metadata `split` equals this; None: all.
        where: only rows that it chooses; None: all.
        decontaminate: leave rows for training out that repeat a text of these sets, or a held-out prompt.
    """

    split: str | None = None
    decontaminate: DecontaminateSection | None = None
    where: Where | None = None


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    Attributes:
        rows: rows of all files.
        files: data files, then documents.
        left_out: number of rows that were not written, by reason.
        splits: rows by the split that the file names carry: train, test, validation.
        notes: settings in which the written rows differ, see `mixing`.
    """

    rows: int
    files: tuple[Path, ...]
    left_out: Mapping[str, int]
    splits: Mapping[str, int]
    notes: tuple[str, ...] = ()


def export(
    store: Path,
    out: Path,
    *,
    shape: Shape = "prompt-completion",
    reasoning: Reasoning = "keep",
    choice: RowChoice | None = None,
    beside: Path | None = None,
) -> Exported:
    """Write a corpus to a new folder.

    Args:
        choice: which rows are written; None: all. Hits of `decontaminate` are listed in contamination.jsonl
            beside the data.
        beside: a folder with own terms records, besides those found from the store.

    Raises:
        ConfigError: unknown format, no row to write, or no folder can be made at `out`.
        StoreError: `out` holds files already, the disk refuses, or the store can't be read.
        TermsRefused: the terms of a lineage don't permit it, or rows were collected for evaluation only.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown format {shape!r}", remedy=f"one of {', '.join(SHAPES)}")
    output_path.check_folder(out)
    corpus = Corpus.open(store)
    own_terms = [store.resolve().parent, *([beside] if beside is not None else [])]
    terms_check.require_permitted(corpus, "export", *own_terms)
    left_out: dict[str, int] = {}
    with_reasoning = reasoning == "keep" and _has_reasoning(corpus)
    choice = choice or RowChoice()
    if choice.where is not None:
        choice = replace(choice, where=choice.where.bind(store))
    mixing = Mixing(store)
    leaks = None if choice.decontaminate is None else RowLeaks(choice.decontaminate, corpus, Path())
    columns = list(
        dict.fromkeys((*_COLUMNS, *MIXING_COLUMNS, *(choice.where.columns if choice.where else ())))
    )
    rows = _rows(
        corpus,
        columns,
        shape,
        reasoning if with_reasoning or reasoning != "keep" else "none",
        lambda sample: _left_out(sample, choice, leaks),
        left_out,
    )
    writer: JsonlFiles | ParquetFiles = JsonlFiles(out)
    if shape in {"prompt-completion", "messages"}:
        writer = ParquetFiles(out, schema_of(shape, with_reasoning=with_reasoning))
    with translate_disk_errors(out), writer:
        for sample, row in rows:
            mixing.add(sample)
            writer.add(file_split(sample.metadata.get("split")), row)
        if not writer.counts:
            raise _nothing(store, left_out)
        files = writer.finish()
        curation = (*curation_lines(store), *mixing.notes())
        if choice.where is not None:
            curation = (*curation, f"Only rows with {choice.where.text} were written.")
        if leaks is not None:
            leaks.write_hits(out / HITS_NAME)
            curation = (*curation, decontamination_line(leaks.facts()))
            leaks.close()
        documents = _write_documents(corpus, out, files, store.resolve().parent, shape, curation)
    counts = dict(writer.counts)
    return Exported(sum(counts.values()), (*files, *documents), left_out, counts, mixing.notes())


def _nothing(store: Path, left_out: Mapping[str, int]) -> ConfigError:
    why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    remedy = "`harvester report` shows what came back" if why else "harvest first: `harvester run`"
    if any(reason.startswith(("request_has", "turn_has", "outcome_tool")) for reason in left_out):
        remedy = "`--to openai` keeps tools, tool calls and parts that are not text"
    return ConfigError(
        f"nothing to export: {f'all rows are left out ({why})' if why else 'the corpus holds no row'}",
        place=str(store),
        remedy=remedy,
    )


def _write_documents(
    corpus: Corpus,
    out: Path,
    files: Sequence[Path],
    beside: Path,
    shape: Shape,
    curation: tuple[str, ...],
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
        curation=curation,
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


def _left_out(sample: Sample, choice: RowChoice, leaks: RowLeaks | None) -> str:
    """Return why a row is not written; "" if it is."""
    if choice.split is not None and sample.metadata.get("split") != choice.split:
        return "other_split"
    if choice.where is not None and not choice.where.matches(sample):
        return "where"
    drop = None if leaks is None else leaks.check(sample)
    return "" if drop is None else drop.reason


def _rows(
    corpus: Corpus,
    columns: Sequence[str],
    shape: str,
    reasoning: Reasoning | Literal["none"],
    why_left_out: Callable[[Sample], str],
    left_out: dict[str, int],
) -> Iterator[tuple[Sample, dict[str, Any]]]:
    """Yield each sample, and the row as it is written."""
    for sample in corpus.samples(columns=columns):
        if sample.purpose != "train":
            raise TermsRefused(
                "rows collected for evaluation can never be exported for training",
                place=f"row {sample.key[:12]}",
                remedy="keep evaluation harvests in a store of their own",
            )
        request = asked_of(sample)
        reason = unfit(shape, sample, request) or why_left_out(sample)
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        if reasoning == "none" and sample.reasoning:
            raise StoreError(
                "the first answer with reasoning came while this was written",
                place=f"row {sample.key[:12]}",
                remedy="export again, into a new folder",
            )
        shown = inlined(sample) if reasoning == "inline" else sample
        yield sample, SHAPES[shape](shown, request, shown.reasoning if reasoning == "keep" else None)

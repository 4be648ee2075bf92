"""Corpus -> the shapes other trainers read, under the Hub's shard names.

Rows collected for evaluation only never leave for training, and mock rows say so in the folder's card.
Shapes: TRL's prompt-completion (default) and messages, OpenAI fine-tuning JSONL, ShareGPT.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from harvester import doors
from harvester.corpus import Corpus
from harvester.errors import ConfigError, StoreError, TermsRefused
from harvester.papers.account import Dataset, Shard, records_of
from harvester.papers.cards import dataset_card
from harvester.papers.croissant import croissant
from harvester.papers.notice import notice
from harvester.registry import load_registry
from harvester.schema import Sample

Shape = Literal["prompt-completion", "messages", "openai", "sharegpt"]
Reasoning = Literal["keep", "inline", "drop"]
ROWS_PER_SHARD = 100_000
_SHAREGPT = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt", "tool": "tool"}
_COLUMNS = ("key", "prompt_id", "messages", "completion", "reasoning", "outcome", "purpose", "metadata_json")


_ROW_ID = (
    ("prompt_id", "string", "id of the prompt that was asked"),
    ("key", "string", "the answer's key in the corpus it came from"),
)
_COLUMNS_OF: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "prompt-completion": _ROW_ID,
    "messages": _ROW_ID,
    "openai": (("messages", "json", "the conversation, the teacher's answer last; a list of messages"),),
    "sharegpt": (("conversations", "json", "the conversation, the teacher's answer last"),),
}
"""What Croissant can say of each shape's columns; lists of messages in Parquet are nested and left out."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote (shards first, then its papers), and what it left out with the reason."""

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
) -> Exported:
    """Write a corpus to a new folder.

    Args:
        split: keep only rows whose metadata `split` equals this; None keeps all.

    Raises:
        ConfigError: unknown shape, or no row to write.
        StoreError: `out` holds files already, or the store can't be read.
        TermsRefused: the terms of a lineage don't permit it, or rows were collected for evaluation only.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}", remedy=f"one of {', '.join(SHAPES)}")
    if out.exists() and any(out.iterdir()):
        raise StoreError("is not empty", place=str(out), remedy="name a new folder")
    corpus = Corpus.open(store)
    doors.ask(corpus, "export", store.resolve().parent)
    left_out: dict[str, int] = {}
    rows = _rows(corpus, SHAPES[shape], reasoning, split, left_out)
    first = next(rows, None)
    if first is None:
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ConfigError(
            f"nothing to export: {f'all rows are left out ({why})' if why else 'the corpus holds no row'}",
            place=str(store),
            remedy="harvest first: `harvester run`" if not why else "`harvester report` shows what came back",
        )
    rows = itertools.chain([first], rows)
    write = _write_parquet if shape in {"prompt-completion", "messages"} else _write_jsonl
    files, count = write(rows, out)
    papers = _write_papers(corpus, out, files, store.resolve().parent, shape)
    return Exported(count, (*files, *papers), left_out)


def _write_papers(
    corpus: Corpus, out: Path, files: Sequence[Path], beside: Path, shape: Shape
) -> tuple[Path, ...]:
    """README.md (dataset card), NOTICE and croissant.json, from the lineages of the corpus."""
    lineages = tuple(corpus.lineages())
    shards = tuple(
        Shard(str(path.relative_to(out)), _sha256(path), _rows_in(path), path.stat().st_size)
        for path in files
    )
    dataset = Dataset(
        name=beside.name,
        version="1.0.0",
        url="",
        creator="",
        published=datetime.now(UTC).date(),
        shards=shards,
        lineages=lineages,
        records=records_of(lineages, load_registry(beside / "terms")),
        columns=_COLUMNS_OF[shape],
    )
    texts = {
        "README.md": dataset_card(dataset),
        "NOTICE": notice(dataset, title=dataset.name),
        "croissant.json": json.dumps(croissant(dataset), indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return tuple(out / name for name in texts)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _rows_in(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    with path.open("rb") as handle:
        return sum(1 for _ in handle)


def _rows(
    corpus: Corpus, to_shape: Callable[[Sample, str | None], dict[str, Any]], reasoning: Reasoning,
    split: str | None, left_out: dict[str, int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for sample in corpus.samples(columns=_COLUMNS):
        if sample.purpose != "train":
            raise TermsRefused(
                "rows collected for evaluation can never be exported for training",
                place=f"row {sample.key[:12]}",
                remedy="keep evaluation harvests in a store of their own",
            )
        reason = ""
        if sample.outcome != "ok" or not sample.completion:
            reason = f"outcome_{sample.outcome}"
        elif split is not None and sample.metadata.get("split") != split:
            reason = "other_split"
        if reason:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        if reasoning == "inline":
            yield to_shape(_inlined(sample), None)
        else:
            yield to_shape(sample, sample.reasoning if reasoning == "keep" else None)


def _inlined(sample: Sample) -> Sample:
    if not sample.reasoning:
        return sample
    return replace(sample, completion=f"<think>\n{sample.reasoning}\n</think>\n\n{sample.completion}")


def _answer(sample: Sample, reasoning: str | None) -> dict[str, Any]:
    answer = {"role": "assistant", "content": sample.completion}
    return {**answer, "reasoning_content": reasoning} if reasoning else answer


def _prompt_completion(sample: Sample, reasoning: str | None) -> dict[str, Any]:
    return {
        "prompt": sample.messages, "completion": [_answer(sample, reasoning)],
        "prompt_id": sample.prompt_id, "key": sample.key,
    }  # fmt: skip


def _messages(sample: Sample, reasoning: str | None) -> dict[str, Any]:
    return {
        "messages": [*sample.messages, _answer(sample, reasoning)],
        "prompt_id": sample.prompt_id, "key": sample.key,
    }  # fmt: skip


def _openai(sample: Sample, reasoning: str | None) -> dict[str, Any]:
    return {"messages": [*sample.messages, _answer(sample, reasoning)]}


def _sharegpt(sample: Sample, reasoning: str | None) -> dict[str, Any]:
    turns = [*sample.messages, _answer(sample, reasoning)]
    return {
        "conversations": [{"from": _SHAREGPT.get(t["role"], t["role"]), "value": t["content"]} for t in turns]
    }


SHAPES: Mapping[str, Callable[[Sample, str | None], dict[str, Any]]] = {
    "prompt-completion": _prompt_completion,
    "messages": _messages,
    "openai": _openai,
    "sharegpt": _sharegpt,
}


def _write_parquet(rows: Iterator[dict[str, Any]], out: Path) -> tuple[tuple[Path, ...], int]:
    """Shards get their final `train-xxxxx-of-yyyyy` names once their number is known."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    hidden: list[Path] = []
    count = 0
    while batch := list(itertools.islice(rows, ROWS_PER_SHARD)):
        path = data / f".train-{len(hidden):05d}.tmp"
        pq.write_table(pa.Table.from_pylist(batch), path, compression="zstd", write_page_checksum=True)
        hidden.append(path)
        count += len(batch)
    names = [data / f"train-{i:05d}-of-{len(hidden):05d}.parquet" for i in range(len(hidden))]
    for path, name in zip(hidden, names, strict=True):
        path.rename(name)
    return tuple(names), count


def _write_jsonl(rows: Iterator[dict[str, Any]], out: Path) -> tuple[tuple[Path, ...], int]:
    out.mkdir(parents=True, exist_ok=True)
    hidden, path, count = out / ".train.jsonl.tmp", out / "train.jsonl", 0
    with hidden.open("w", encoding="utf-8") as handle:
        for count, row in enumerate(rows, start=1):  # noqa: B007 - the last value is the count
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
    hidden.rename(path)
    return (path,), count

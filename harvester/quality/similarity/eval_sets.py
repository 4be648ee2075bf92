"""Read the texts of evaluation sets: JSON lines, a JSON list, Parquet, or folders of such files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError

# Remedies of a row and of a file that can't be read.
_ROWS = 'a row is a JSON object on a line of its own, as in {"question": "..."}, or a text'
_READABLE = "[decontaminate] sets names JSON lines, JSON or Parquet files, or folders of them"

SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".parquet"})

# Fields that hold what an evaluation asks. If a row has any of them, its other fields are not compared.
ASKING_FIELDS = (
    *("messages", "conversations", "prompt", "question", "query", "problem", "instruction", "input"),
    *("text", "ctx", "context", "passage", "article", "sentence", "premise", "goal", "stem"),
)


@dataclass(frozen=True, slots=True)
class EvalText:
    """One text of an evaluation set; `place` is its file and row, for reports."""

    text: str
    place: str


def files_of(path: Path) -> list[Path]:
    """Return the files of an evaluation set, in order of their names.

    Raises:
        ConfigError: there is none.
    """
    if path.is_dir():
        files = sorted(
            found
            for found in path.rglob("*")
            if found.suffix.lower() in SUFFIXES and found.is_file() and not found.name.startswith(".")
        )
    else:
        files = [path] if path.is_file() else []
    if not files:
        raise ConfigError(
            "holds no evaluation set",
            place=str(path),
            remedy=f"name a file or a folder of files that end in {', '.join(sorted(SUFFIXES))}",
        )
    return files


def read(path: Path, fields: Sequence[str] = ()) -> Iterator[EvalText]:
    """Yield the texts of an evaluation set.

    Args:
        fields: names of the fields to compare; empty: those of `ASKING_FIELDS` that a row has, else all.

    Raises:
        ConfigError: a file can't be read, or no row has one of the fields.
    """
    empty = True
    for file in files_of(path):
        for number, row in _rows(file):
            for text in _texts_of(row, fields):
                if text.strip():
                    empty = False
                    yield EvalText(text, f"{file.name}:{number}")
    if empty:
        raise ConfigError(
            f"has no text in {', '.join(fields) or 'any field'}",
            place=str(path),
            remedy='{path = "evals.jsonl", fields = ["question"]} names the fields to compare',
        )


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a file with their numbers, from 1."""
    try:
        if file.suffix.lower() == ".parquet":
            yield from _parquet_rows(file)
            return
        with file.open(encoding="utf-8") as lines:
            if file.suffix.lower() == ".json":
                loaded = json.load(lines)
                rows = loaded if isinstance(loaded, list) else [loaded]
                yield from ((number, _row(row, file, number)) for number, row in enumerate(rows, start=1))
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        loaded = json.loads(line)
                    except ValueError as error:
                        place = f"{file}:{number}"
                        raise ConfigError(f"is no JSON: {error}", place=place, remedy=_ROWS) from None
                    yield number, _row(loaded, file, number)
    except (OSError, ValueError, RecursionError) as error:
        message = f"can't be read as an evaluation set: {error}"
        raise ConfigError(message, place=str(file), remedy=_READABLE) from None


def _row(loaded: Any, file: Path, number: int) -> Mapping[str, Any]:
    if isinstance(loaded, str):
        return {"text": loaded}
    if not isinstance(loaded, dict):
        raise ConfigError("a row is a JSON object, or a text", place=f"{file}:{number}", remedy=_ROWS)
    return loaded


def _parquet_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        raise ConfigError(f"can't be read as Parquet: {error}", place=str(file), remedy=_READABLE) from None


def _texts_of(row: Mapping[str, Any], fields: Sequence[str]) -> Iterator[str]:
    """Yield the texts of a row; of conversations those that a user says."""
    names = fields or [name for name in ASKING_FIELDS if row.get(name)] or list(row)
    for name in names:
        yield from _leaves(row.get(name))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        role = value.get("role", value.get("from"))
        if role is None:
            for held in value.values():
                yield from _leaves(held)
        elif role in {"user", "human"}:
            yield from _leaves(value.get("content", value.get("value")))
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _leaves(held)

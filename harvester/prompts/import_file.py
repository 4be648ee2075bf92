"""Convert a prompt file of another tool to prompt lines (`harvester import`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from harvester.errors import ConfigError, PromptError
from harvester.prompts import dataset_folders, formats, reader, recognise
from harvester.prompts.compression import COMPRESSED
from harvester.prompts.recognise import Converted
from harvester.prompts.turns import RowError
from harvester.store.journal.records import as_json
from harvester.system import output_path
from harvester.system.own_files import temporary_name

Answers = Literal["drop", "reference"]

# Characters of the first prompt line that are shown.
SHOWN_CHARACTERS = 400
_OWN_FIELDS = frozenset({"prompt", "messages", "reference", "tags", "id", *recognise.SENT_FIELDS})


@dataclass(slots=True)
class Imported:
    """What an import did.

    Attributes:
        rows: prompt lines written.
        formats: number of rows by recognised format.
        answers: number of rows that held an answer.
        dropped: number of rows in which something was left out, by its name.
        metadata: names of the columns that are kept as metadata.
        skipped: number of rows that were not written, by reason, and the place of the first of each.
        first: the first prompt line, and where it came from.
    """

    rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    answers: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    metadata: set[str] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_at: dict[str, str] = field(default_factory=dict)
    first: str = ""
    first_at: str = ""

    def write(self, line: bytes, format: str, place: str) -> None:
        """Count a prompt line that was written, and keep the first one."""
        self.rows += 1
        self.formats[format] += 1
        if not self.first:
            self.first, self.first_at = line.decode("utf-8", "replace"), place

    def find_answer(self) -> None:
        """Count a row that holds an answer."""
        self.answers += 1

    def drop(self, *names: str) -> None:
        """Count what is left out of a row, by its names."""
        self.dropped.update(names)

    def keep(self, column: str) -> None:
        """Note a column that is kept as metadata."""
        self.metadata.add(column)

    def skip(self, reason: str, place: str) -> None:
        """Count a row that is not written."""
        self.skipped[reason] += 1
        self.skipped_at.setdefault(reason, place)


def default_output(path: Path) -> Path:
    """Return the file beside `path` that its prompt lines are written to: `NAME.prompts.jsonl`."""
    path = path.resolve()
    name = path.name
    while path.is_file() and Path(name).suffix.lower() in {*COMPRESSED, *formats.SUFFIXES}:
        name = Path(name).stem
    return path.with_name(f"{name}.prompts.jsonl")


def import_file(path: Path, out: Path, *, answers: Answers = "drop", column: str = "") -> Imported:
    """Write the rows of `path` as prompt lines to the new file `out`.

    Args:
        answers: what becomes of answers that the rows hold: "drop" or "reference".
        column: the column with the question; "" to recognise it.

    Raises:
        PromptError: the file can't be read, or no row of it is recognised.
        ConfigError: `out` exists, or can't be written.
    """
    with _new_file(out) as handle:
        return write_lines(path, handle, answers=answers, column=column)


def write_lines(path: Path, handle: BinaryIO, *, answers: Answers = "drop", column: str = "") -> Imported:
    """Write the rows of `path` as prompt lines to an open file; see `import_file`."""
    imported, ids = Imported(), set[str]()
    columns: dict[str, None] = {}
    for place, row in _rows(path):
        if isinstance(row, PromptError):
            imported.skip(row.message, row.place)
            continue
        if len(columns) < 100:
            columns.update(dict.fromkeys(map(str, row)))
        try:
            converted = recognise.convert(row, column)
            if converted is None:
                imported.skip("no column that is recognised", place)
                continue
            line = _line(row, converted, answers, imported, ids)
            encoded = as_json(line)
            reader.to_prompt(line, file="", line=0)
        except RowError as error:
            imported.skip(str(error), place)
            continue
        except PromptError as error:
            imported.skip(error.message, place)
            continue
        handle.write(encoded + b"\n")
        imported.write(encoded, converted.format, place)
    if not imported.rows:
        raise _nothing(path, imported, list(columns), column)
    return imported


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | PromptError]]:
    name = reader.printable_path(path)
    if path.is_dir():
        if not dataset_folders.is_dataset(path):
            raise PromptError(
                "is a folder, and no dataset that `datasets` saved", place=name, remedy="name a file in it"
            )
        files = dataset_folders.files_of(path, name)
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise PromptError(
            "is no regular file but a pipe, a socket or a device",
            place=name,
            remedy="save it to a file first",
        )
    else:
        raise PromptError("there is no such file", place=name, remedy="check the name")
    for file in files:
        own_name = reader.printable_path(file)
        for number, row in formats.rows(file, own_name, any_columns=True):
            yield f"{own_name}:{number}", row


def _line(
    row: Mapping[str, Any], converted: Converted, answers: Answers, imported: Imported, ids: set[str]
) -> dict[str, Any]:
    """Return the prompt line of a row, and count what it leaves out."""
    used = set(converted.used)
    line: dict[str, Any] = {
        **_own_id(row, used, imported, ids),
        **_request_fields(converted),
        **converted.fields,
    }
    if converted.answer is not None:
        imported.find_answer()
        if answers == "reference":
            line["reference"] = converted.answer
        else:
            imported.drop("answers")
    for name in ("reference", "tags"):
        if row.get(name) is not None and name not in line and (name == "reference" or _are_tags(row[name])):
            line[name] = row[name]
            used.add(name)
    for name, value in row.items():
        if name in used or name in converted.dropped or value in (None, ""):
            continue
        if name in _OWN_FIELDS or _holds_bytes(value):
            imported.drop(f"column {name}")
            continue
        line[str(name)] = value
        imported.keep(str(name))
    imported.drop(*converted.dropped)
    return line


def _own_id(row: Mapping[str, Any], used: set[str], imported: Imported, ids: set[str]) -> dict[str, str]:
    """Return the id of a row as a field of its line; nothing if it has none, or one that came before."""
    for name, value in recognise.identities(row):
        if isinstance(value, str | int) and not isinstance(value, bool):
            used.add(name)
            if str(value) in ids:
                imported.drop("ids that occur twice")
                return {}
            ids.add(str(value))
            return {"id": str(value)}
    return {}


def _request_fields(converted: Converted) -> dict[str, Any]:
    messages = converted.messages
    if len(messages) == 1 and messages[0]["role"] == "user" and isinstance(messages[0]["content"], str):
        return {"prompt": messages[0]["content"]}
    return {"messages": messages}


def _are_tags(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(tag, str) for tag in value)


def _holds_bytes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bytes, value.values()))
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    return isinstance(value, bytes)


def _nothing(path: Path, imported: Imported, columns: list[str], column: str) -> PromptError:
    name = reader.printable_path(path)
    if not imported.skipped:
        return PromptError("holds no row", place=name, remedy="name a file with rows")
    if column and columns and column not in columns:
        shown = ", ".join(columns[:20])
        return PromptError(
            f"has no column {column!r}; its columns are {shown}", place=name, remedy="name one of these"
        )
    reasons = "; ".join(
        f"{count:,} rows: {reason} (the first is {imported.skipped_at[reason]})"
        for reason, count in imported.skipped.most_common(3)
    )
    shown = f"; its columns are {', '.join(columns[:20])}" if columns else ""
    return PromptError(
        f"no row can be imported: {reasons}{shown}",
        place=name,
        remedy="name the column that holds the question: --column NAME",
    )


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a hidden file that becomes `path` when the block ends without an error; never over a file.

    Raises:
        ConfigError: `path` exists, or can't be written. StoreFull: the disk is full.
    """
    hidden = temporary_name(path)
    exists = ConfigError(
        "exists already, and nothing is overwritten", place=str(path), remedy="name a new file with --out"
    )
    if os.path.lexists(path):
        raise exists
    try:
        with hidden.open("xb") as handle:
            yield handle
        os.link(hidden, path)  # fails if it exists meanwhile, unlike a rename
    except FileExistsError:
        raise exists from None
    except OSError as error:
        remedy = "name a file in a folder of your own with --out"
        raise output_path.refused(error, path, remedy) from None
    finally:
        hidden.unlink(missing_ok=True)

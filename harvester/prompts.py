"""Prompt files -> Prompt, streamed, with file and line in every error.

JSONL (also .gz), Parquet, CSV and plain text (one prompt a line). A JSON line is
`{"prompt": "..."}` or `{"messages": [...]}`, with optional `id`, `reference`, `tags`; any further
field travels as metadata. Nothing here is sent anywhere but the messages.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from harvester.errors import NoPrompts, PromptError
from harvester.journey import Message, Prompt
from harvester.keys import canonical
from harvester.records import as_json
from harvester.tolerance import Bad

MAX_LINE_BYTES = 16 * 1024 * 1024
MOST_LEVELS = 250
"""JSON is written 254 levels deep at most, and read much deeper."""
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_OWN_FIELDS = frozenset({"id", "prompt", "messages", "reference", "tags"})
_Row = tuple[int, Mapping[str, Any] | PromptError]
_BOM = b"\xef\xbb\xbf"


def find(files: Sequence[str], root: Path) -> list[Path]:
    """The prompt files that the configured names and globs mean, in a stable order, each once.

    Raises:
        NoPrompts: a name or glob that matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in files:
        base = Path(pattern)
        matches = [base] if base.is_absolute() else sorted(root.glob(pattern))
        for path in matches:
            if path.is_fifo() or path.is_char_device():
                raise PromptError(
                    "is a pipe or a terminal, which can't be read twice",
                    place=str(path),
                    remedy="save the prompts to a .jsonl file first: a run counts them before it asks",
                )
        matches = [path for path in matches if path.is_file()]
        if not matches:
            raise NoPrompts(
                f"no prompt file matches {pattern!r}",
                place=str(root),
                remedy="names and globs are resolved beside the configuration file",
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def first_counts(error: PromptError) -> None:
    """No line may be bad."""
    raise error


def read(files: Sequence[str], root: Path, bad: Bad = first_counts) -> Iterator[Prompt]:
    """All prompts of all files, in file order, one at a time.

    Args:
        bad: hears of each line that can't be used; it is passed over unless `bad` raises.

    Raises:
        PromptError: the first file or line that can't be used.
    """
    empty = True
    for path in find(files, root):
        for prompt in read_file(path, root, bad):
            empty = False
            yield prompt
    if empty:
        raise NoPrompts("the prompt files hold no prompt", place=", ".join(files))


def read_file(path: Path, root: Path, bad: Bad = first_counts) -> Iterator[Prompt]:
    """The prompts of one file; names in errors are relative to `root`. `bad` as for `read`.

    Raises:
        PromptError: the first line that can't be used.
    """
    name = str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
    for line, fields in _rows(path, name):
        try:
            if isinstance(fields, PromptError):
                raise fields
            prompt = to_prompt(fields, file=name, line=line)
        except PromptError as error:
            bad(error)
            continue
        yield prompt


def to_prompt(fields: Mapping[str, Any], *, file: str, line: int) -> Prompt:
    """One loaded row as a Prompt.

    Raises:
        PromptError: no messages, or messages of a shape the API doesn't know.
    """
    place = f"{file}:{line}" if line else file
    messages = _messages(fields, place)
    reference = fields.get("reference")
    if reference is not None and not isinstance(reference, str):
        reference = _as_text(reference)
    tags = fields.get("tags") or ()
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) for tag in tags):
        raise PromptError("tags must be a list of strings", place=place)
    identity = fields.get("id")
    return Prompt(
        id=_derived_id(messages, place) if identity in (None, "") else str(identity),
        messages=messages,
        reference=reference,
        tags=tuple(tags),
        metadata={name: value for name, value in fields.items() if name not in _OWN_FIELDS},
        file=file,
        line=line,
    )


def _messages(fields: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    text, messages = fields.get("prompt"), fields.get("messages")
    if text is not None and messages is not None:
        raise PromptError("both 'prompt' and 'messages' are given", place=place, remedy="keep one")
    if messages is None:
        if not isinstance(text, str) or not text.strip():
            raise PromptError(
                "needs 'prompt' (text) or 'messages' (a list)",
                place=place,
                remedy='a line is {"prompt": "..."} or {"messages": [...]}',
            )
        return ({"role": "user", "content": text},)
    if not isinstance(messages, list) or not messages:
        raise PromptError("'messages' must be a list with at least one message", place=place)
    if not _are_plain(messages, place):  # what is a role and a text has a key; to walk it costs a microsecond
        _require_key(messages, place)
    return tuple(messages)


def _are_plain(messages: list[Any], place: str) -> bool:
    """Whether they hold nothing but roles and texts; raises PromptError for what is no message."""
    plain = True
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise PromptError(f"message {number} needs a role out of {', '.join(sorted(ROLES))}", place=place)
        content = message.get("content")
        if not isinstance(content, str):
            plain = False
            if not (isinstance(content, list) or (content is None and message.get("tool_calls"))):
                raise PromptError(f"message {number} needs 'content' (text or a list of parts)", place=place)
        elif len(message) != 2:
            plain = False
    return plain


def _require_key(messages: list[Message], place: str) -> None:
    """Met here, before a send: no key can be made of it later."""
    try:
        canonical(messages)
    except ValueError as error:
        raise PromptError(
            str(error), place=place, remedy="integers go to 2**53 - 1; greater ones are written as text"
        ) from None


def _as_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:  # out of Parquet: bytes, decimals
        return as_json(value).decode()


def _derived_id(messages: tuple[Message, ...], place: str) -> str:
    try:
        return hashlib.sha256(orjson.dumps(messages, option=orjson.OPT_SORT_KEYS)).hexdigest()[:24]
    except (orjson.JSONEncodeError, TypeError) as error:
        raise PromptError(f"text that is not valid Unicode: {error}", place=place) from None


def _rows(path: Path, name: str) -> Iterator[_Row]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes[-1:] or [""])[0]
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path)
        elif kind == ".csv":
            yield from _csv_rows(path, name)
        elif kind in {".jsonl", ".ndjson", ".json"}:
            yield from _json_rows(path, name)
        elif kind == ".txt":
            yield from _text_rows(path, name)
        else:
            raise PromptError(
                f"unknown kind of prompt file {kind or '(no suffix)'!r}",
                place=name,
                remedy="use .jsonl, .jsonl.gz, .parquet, .csv or .txt",
            )
    except (OSError, EOFError, pa.ArrowException) as error:
        raise PromptError(f"can't be read: {error}", place=name) from None


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes | PromptError]]:
    """Non-blank lines without their ends; a byte order mark at the start is dropped."""
    with _open(path) as handle:
        number = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield number, PromptError(f"longer than {MAX_LINE_BYTES >> 20} MiB", place=f"{name}:{number}")
                while line and not line.endswith(b"\n"):
                    line = handle.readline(MAX_LINE_BYTES)
                continue
            text = line.removeprefix(_BOM) if number == 1 else line
            if text.strip():
                yield number, text


def _json_rows(path: Path, name: str) -> Iterator[_Row]:
    for number, line in _lines(path, name):
        yield number, line if isinstance(line, PromptError) else _json_row(line, f"{name}:{number}")


def _json_row(line: bytes, place: str) -> Mapping[str, Any] | PromptError:
    try:
        loaded = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return PromptError(f"not a JSON line: {error}", place=place, remedy='a line is {"prompt": "..."}')
    if not isinstance(loaded, dict):
        return PromptError(f"a JSON object is expected, found {type(loaded).__name__}", place=place)
    if len(line) > 2 * MOST_LEVELS and line.count(b"[") + line.count(b"{") > MOST_LEVELS:
        try:
            orjson.dumps([[loaded]])  # as deep as any of our documents holds it
        except orjson.JSONEncodeError:
            return PromptError("nested too deep", place=place, remedy=f"{MOST_LEVELS} levels are the most")
    return loaded


def _text_rows(path: Path, name: str) -> Iterator[_Row]:
    for number, line in _lines(path, name):
        if isinstance(line, PromptError):
            yield number, line
            continue
        try:
            yield number, {"prompt": line.decode("utf-8").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, PromptError(f"not UTF-8: {error.reason}", place=f"{name}:{number}")


def _csv_rows(path: Path, name: str) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle, strict=True)
        if "prompt" not in (reader.fieldnames or ()):
            raise PromptError("the header has no column 'prompt'", place=f"{name}:1")
        try:
            for row in reader:
                if None in row:
                    place = f"{name}:{reader.line_num}"
                    yield reader.line_num, PromptError("more cells than the header names", place=place)
                    continue
                yield reader.line_num, {key: value for key, value in row.items() if value not in (None, "")}
        except (csv.Error, UnicodeDecodeError) as error:
            raise PromptError(f"not readable as CSV: {error}", place=f"{name}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[_Row]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, {key: value for key, value in row.items() if value is not None}

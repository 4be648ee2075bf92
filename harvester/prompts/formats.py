"""Read the rows of a prompt file (JSONL, CSV, text, Parquet, Arrow) as dicts, each with its line number.

A line that can't be used is yielded as the error that names it, so that the caller may skip it. A file that
can't be read raises. pyarrow is imported for files that need it: loading it delays every run.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from harvester.errors import PromptError
from harvester.prompts import json_lists
from harvester.prompts.compression import RewrittenError, kind_of, open_file
from harvester.system.command_line.shell_words import shell_word
from harvester.system.decode_first import UndecodableError, require_decodable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

# A longer line of a JSON Lines or text file is a bad line.
MAX_LINE_BYTES = 16 * 1024 * 1024

# Deepest nesting of a JSON line. orjson writes at most 254 levels, though it reads more.
MOST_LEVELS = 250

# Suffixes of the files that are read.
SUFFIXES = frozenset(
    {".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet", ".arrow", ".arrows", ".feather", ".ipc"}
)

_TEXT_KINDS = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".txt"})

# Largest batch of rows: their number, and about their bytes.
MAX_BATCH_ROWS, MAX_BATCH_BYTES = 1024, 64 << 20
# Most bytes of blank lines in a row: a small compressed file may hold any number of them.
MOST_BLANK_BYTES = 4 << 20
# Beginnings of text in other encodings than UTF-8.
_OTHER_TEXTS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_RUN_AGAIN = "run again: the new file is read; a file that is replaced by a rename disturbs no run"
_SAVE_AGAIN = "save the file again, or name another one"
_CONVERT = "convert the file: `iconv -f latin1 -t utf-8`, with the encoding that it has in place of latin1"

# Members of a line of which the last one would count, were there two.
_ONCE = ("prompt", "messages")
_PROMPT_MEMBERS = (b'"prompt"', b'"messages"')

Row = tuple[int, Mapping[str, Any] | PromptError]
_BOM = b"\xef\xbb\xbf"


def rows(path: Path, name: str, *, growing: bool = False, any_columns: bool = False) -> Iterator[Row]:
    """Yield line number (from 1; row number in Parquet and Arrow) and fields, or the error of the line.

    Args:
        name: the file's name for errors.
        growing: somebody may still be writing, so a last line of text without a line end is an error: it
            may be half a line.
        any_columns: accept a CSV file whose header has no column `prompt`, and JSON files that are one list.

    Raises:
        PromptError: the file can't be read, or no further than here.
    """
    kind = kind_of(path)
    try:
        if kind in _TEXT_KINDS:
            _require_utf8(path, name)
        if kind == ".parquet":
            yield from _parquet_rows(path, name)
        elif kind in {".arrow", ".feather", ".ipc", ".arrows"}:
            yield from _arrow_rows(path, name)
        elif kind == ".csv":
            yield from _csv_rows(path, name, growing, any_columns)
        elif any_columns and kind == ".json" and _is_list(path):
            yield from json_lists.rows(path, name, MAX_LINE_BYTES)
        elif kind in {".jsonl", ".ndjson", ".json"}:
            yield from _json_rows(path, name)
        elif kind == ".txt":
            yield from _text_rows(path, name, growing)
        else:
            raise PromptError(
                f"unknown kind of prompt file {kind or '(no suffix)'!r}",
                place=name,
                remedy="use .jsonl, .csv, .txt (each also .gz or .zst), .parquet or .arrow",
            )
    except (GeneratorExit, PromptError):  # an error of Arrow is looked for in others only: it is loaded then
        raise
    except _read_errors() as error:
        remedy = _RUN_AGAIN if isinstance(error, RewrittenError) else _SAVE_AGAIN
        raise PromptError(f"can't be read: {error}", place=name, remedy=remedy) from None


def _require_utf8(path: Path, name: str) -> None:
    """Refuse a text whose first bytes say that it has another encoding.

    Raises:
        PromptError: it has.
    """
    with open_file(path) as handle:
        encoding = _OTHER_TEXTS.get(handle.read(2))
    if encoding:
        remedy = f"convert it: `iconv -f {encoding} -t UTF-8 IN > OUT`"
        raise PromptError(f"is {encoding} text, and UTF-8 is read", place=name, remedy=remedy)


def _read_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a file that can't be read; called once there is an error."""
    import pyarrow as pa

    return (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException)


def _is_list(path: Path) -> bool:
    with open_file(path) as handle:
        return handle.read(4096).removeprefix(_BOM).lstrip()[:1] == b"["


def _too_long(name: str, number: int) -> PromptError:
    return PromptError(
        f"longer than {MAX_LINE_BYTES >> 20} MiB",
        place=f"{name}:{number}",
        remedy="shorten it, and name images by URL; a file without line ends is one long line",
    )


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes | PromptError]]:
    """Yield non-blank lines with their line ends; a byte order mark at the start is dropped."""
    with open_file(path) as handle:
        number = blank_bytes = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            text = line.removeprefix(_BOM) if number == 1 else line
            blank_bytes = _blank_bytes(blank_bytes, text, name, number)
            if len(line) > MAX_LINE_BYTES:
                yield number, _too_long(name, number)
                while line and not line.endswith(b"\n"):
                    line = handle.readline(MAX_LINE_BYTES)
                continue
            if text and not blank_bytes:
                yield number, text


def _blank_bytes(before: int, line: bytes | str, name: str, number: int) -> int:
    """Return the size of the blank lines that this line ends, 0 if it is none itself.

    Raises:
        PromptError: they are too many.
    """
    if line.strip():
        return 0
    size = before + len(line)
    if size > MOST_BLANK_BYTES:
        message = f"more than {MOST_BLANK_BYTES >> 20} MiB of blank lines"
        raise PromptError(message, place=f"{name}:{number}", remedy=_SAVE_AGAIN)
    return size


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    for number, line in _lines(path, name):
        yield number, line if isinstance(line, PromptError) else _json_row(line, f"{name}:{number}")


def _not_utf8_at(line: bytes) -> int | None:
    """Return the place of the first byte that is no UTF-8; None where all is."""
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _json_row(line: bytes, place: str) -> Mapping[str, Any] | PromptError:
    try:
        loaded = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if (at := _not_utf8_at(line)) is not None:
            message = f"is not UTF-8: byte {at + 1} of the line can't be read"
            remedy = "save the file as UTF-8, as `iconv -f latin1 -t utf-8 FILE` does; is it a text file?"
            return PromptError(message, place=place, remedy=remedy)
        remedy = 'a line is {"prompt": "..."}'
        if place.endswith(":1") and line.lstrip()[:1] in b"[{" and ".json" in place:
            remedy += f"; if the file is one list or object, {import_remedy(place[:-2])}"
        return PromptError(f"not a JSON line: {error}", place=place, remedy=remedy)
    if not isinstance(loaded, dict):
        remedy = import_remedy(place.rpartition(":")[0]) if isinstance(loaded, list) and loaded else ""
        message = f"a JSON object is expected, found {type(loaded).__name__}"
        return PromptError(message, place=place, remedy=remedy)
    if len(line) > 2 * MOST_LEVELS and line.count(b"[") + line.count(b"{") > MOST_LEVELS:
        try:
            orjson.dumps([[loaded]])  # the deepest nesting in which a record stores it
        except orjson.JSONEncodeError:
            return PromptError("nested too deep", place=place, remedy=f"{MOST_LEVELS} levels are the most")
    if any(line.count(member) > 1 for member in _PROMPT_MEMBERS):
        try:
            json.loads(line, object_pairs_hook=_without_repeated_names)
        except _RepeatedName as error:
            return PromptError(f"has the member {str(error)!r} twice", place=place, remedy="remove one")
    if isinstance(loaded.get("id"), float):
        loaded["id"] = _exact_id(line)
    return loaded


class _RepeatedName(Exception):
    """An object has two members of one name."""


def _without_repeated_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in _ONCE:
        if names.count(name) > 1:
            raise _RepeatedName(name)
    return dict(pairs)


def _exact_id(line: bytes) -> Any:
    """Return an id of more than 64 bits with all its digits: as a float it might equal another one."""
    fields = json.loads(line.removeprefix(_BOM), parse_int=str)
    return fields["id"]


def _text_rows(path: Path, name: str, growing: bool) -> Iterator[Row]:
    for number, line in _lines(path, name):
        if isinstance(line, PromptError):
            yield number, line
        elif growing and not line.endswith(b"\n"):
            yield number, _unended(name, number)
        else:
            try:
                yield number, {"prompt": line.decode("utf-8").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                yield (
                    number,
                    PromptError(f"not UTF-8: {error.reason}", place=f"{name}:{number}", remedy=_CONVERT),
                )


def _csv_records(reader: Any, header: list[str], name: str) -> Iterator[Row]:
    """Yield the records after the header, each with its first line: a cell in quotes may have several."""
    ended = reader.line_num
    for cells in reader:
        number, ended = ended + 1, reader.line_num
        if len(cells) > len(header):
            yield (
                number,
                PromptError(
                    f"{len(cells)} cells, and the header names {len(header)}",
                    place=f"{name}:{number}",
                    remedy='a cell with a comma, a quote or a line break stands in quotes: "one, two"',
                ),
            )
        elif cells:
            yield number, {column: cell for column, cell in zip(header, cells, strict=False) if cell}


def _csv_rows(path: Path, name: str, growing: bool, any_columns: bool) -> Iterator[Row]:
    held_back = False
    csv.field_size_limit(MAX_LINE_BYTES)  # of this process; the library's default is 128 KiB

    def lines(handle: io.TextIOWrapper) -> Iterator[str]:
        nonlocal held_back
        number = blank_bytes = 0
        while line := handle.readline(MAX_LINE_BYTES + 1):
            number += 1
            blank_bytes = _blank_bytes(blank_bytes, line, name, number)
            if len(line) > MAX_LINE_BYTES:
                raise _too_long(name, number)
            held_back = growing and not line.endswith(("\r", "\n"))
            if not held_back:
                yield line

    with open_file(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(lines(handle), strict=True)
        try:
            header = next(filter(None, reader), [])
            if not any_columns and "prompt" not in header:
                raise PromptError(
                    "the header has no column 'prompt'", place=f"{name}:1", remedy=import_remedy(name)
                )
            _require_single_names(header, f"{name}:1")
            yield from _csv_records(reader, header, name)
        except (csv.Error, UnicodeDecodeError) as error:
            raise PromptError(
                f"not readable as CSV: {error}",
                place=f"{name}:{reader.line_num + 1}",
                remedy=_CONVERT
                if isinstance(error, UnicodeDecodeError)
                else 'a quote inside a cell is written twice: "say ""hello"""',
            ) from None
        if held_back:
            yield reader.line_num + 1, _unended(name, reader.line_num + 1)


def _require_single_names(columns: Sequence[str], place: str) -> None:
    """Refuse two columns of one name: one of them would be lost.

    Raises:
        PromptError: there are.
    """
    seen: set[str] = set()
    for column in filter(None, columns):
        if column in seen:
            raise PromptError(f"has two columns {column!r}", place=place, remedy="rename or remove one")
        seen.add(column)


def _unended(name: str, number: int) -> PromptError:
    return PromptError(
        "the last line has no end yet",
        place=f"{name}:{number}",
        remedy="it is read once it ends with a line break",
    )


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow.parquet as pq

    _require_decodable(path, name, "decode_parquet")
    with pq.ParquetFile(path) as file:
        _require_single_names(file.schema_arrow.names, name)
        yield from _numbered(_parquet_batches(file), name)


def _parquet_batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most some 1,024 rows and 64 MiB: rows may be large."""
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        rows_at_once = MAX_BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
        yield from file.iter_batches(max(1, min(MAX_BATCH_ROWS, rows_at_once)), row_groups=[number])


def decode_parquet(path: str) -> int:
    """Decode every row of a Parquet file and count them; for a child process, as Arrow may end it."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return sum(batch.num_rows for batch in _parquet_batches(file))


def decode_arrow(path: str) -> int:
    """Decode and validate every batch of an Arrow file and count its rows; for a child process."""
    return sum(batch.num_rows for batch in _arrow_batches(Path(path)))


def _require_decodable(path: Path, name: str, function: str) -> None:
    """Decode a file in a child process first.

    Raises:
        PromptError: it can't be decoded.
    """
    try:
        require_decodable(path, f"{__name__}:{function}")
    except UndecodableError as error:
        raise PromptError(str(error), place=name, remedy=_SAVE_AGAIN) from None


def _arrow_rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file or stream, as `datasets` and others write them."""
    _require_decodable(path, name, "decode_arrow")
    batches = _single_named(_arrow_batches(path), name)
    slices = (b.slice(start, MAX_BATCH_ROWS) for b in batches for start in range(0, len(b), MAX_BATCH_ROWS))
    yield from _numbered(slices, name)


def _single_named(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file after a look at their columns; see `_require_single_names`."""
    for number, batch in enumerate(batches):
        if number == 0:
            _require_single_names(batch.schema.names, name)
        yield batch


def _numbered(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[Row]:
    """Yield the rows of all batches with their numbers."""
    for number, row in enumerate(itertools.chain.from_iterable(map(_loaded, batches)), start=1):
        if isinstance(row, Exception):
            yield number, PromptError(f"can't be read: {row}", place=f"{name}:{number}")
        else:
            yield number, _without_nulls(row)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield validated batches: offsets that lead outside would end the process later."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        numbers = range(reader.num_record_batches) if is_file else ()
        for batch in map(reader.get_batch, numbers) if is_file else reader:
            batch.validate(full=True)
            yield batch


def import_remedy(name: str) -> str:
    """Return what to do with a file of another form."""
    return f"`harvester import {shell_word(Path(name))}` writes it as prompt lines"


def _without_nulls(value: Any) -> Any:
    """Remove the members of dicts that are None, at any depth.

    Every row of a Parquet file has all fields of the file's structs; None stands for a field that the row
    does not have. Sent as null it would be refused by strict servers, and it would change the request key.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _loaded(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """Yield rows as Python values, or the error of a row that has none (invalid UTF-8, date out of range)."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for row in range(len(batch)):
            try:
                yield from batch.slice(row, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield error

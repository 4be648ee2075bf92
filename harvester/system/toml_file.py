"""Read TOML files that an operator wrote, and check their tables against a pydantic model.

Every error names the file, the key or line, and what to write instead. An unknown key is an error that
names the nearest known key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, core_schema

from harvester.errors import ConfigError
from harvester.system.own_files import MAX_TOML_BYTES, read_bytes

Model = TypeVar("Model", bound=BaseModel)

# Keys by which a TOML file of another command is known, that file, and commands that take it.
_FILES_BY_KEYS = (
    (("judge",), "judge.toml", "`harvester judge`"),
    (("teacher",), "harvest.toml", "`harvester plan` and `harvester run`"),
    (("student",), "train.toml", "`trainer plan` and `trainer train`"),
    (("filters",), "curate.toml", "`harvester curate`"),
    (("curate", "mock_teacher"), "distil.toml", "`trainer distil`"),
    (("pool",), "loop.toml", "`trainer loop`"),
    (("rows", "seeds"), "curve.toml", "`trainer curve`"),
)
# Minimum similarity (difflib ratio, 0 to 1) for suggesting a key of another table.
_OTHER_TABLE_CUTOFF = 0.8
# How a check of several keys names the first of them.
_KEY_IN_WORDS = re.compile(r"\[([\w.]+)\] (\w+)")

# What is wrong with a value, by pydantic's error type; {names} are of the error's context.
_PROBLEMS = {
    "missing": "is missing",
    "string_type": "must be text in quotes",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list in [brackets]",
    "list_type": "must be a list in [brackets]",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have {min_length} characters or more",
    "too_short": "must have {min_length} entries or more",
    "date_type": "must be a date, as in 2026-11-01",
    "date_parsing": "must be a date, as in 2026-11-01",
    "date_from_datetime_parsing": "must be a date, as in 2026-11-01",
    "date_from_datetime_inexact": "must be a date, as in 2026-11-01",
    "datetime_type": "must be a time, as in 2026-11-01T08:00:00Z",
    "datetime_parsing": "must be a time, as in 2026-11-01T08:00:00Z",
    "datetime_from_date_parsing": "must be a time, as in 2026-11-01T08:00:00Z",
    "timezone_aware": "must have a time zone, as in 2026-11-01T08:00:00Z",
}


class Matching:
    """Annotates a text that must match a pattern: the error says in words what to write.

    Args:
        pattern: for the whole text; it stands in the JSON Schema.
        words: what to write, as in `must be 64 hexadecimal digits`.
    """

    def __init__(self, pattern: str, words: str) -> None:
        self._pattern = pattern
        self._words = words

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check the pattern after the type."""
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Give the pattern to editors."""
        return {**handler(schema), "pattern": f"^({self._pattern})$"}

    def _check(self, text: str) -> str:
        if not re.fullmatch(self._pattern, text):
            raise ValueError(self._words)
        return text


@dataclass(frozen=True, slots=True)
class TomlFile:
    """A TOML file that was read.

    Attributes:
        place: its path, for errors.
        text: its content; the lines of keys come from it.
        table: the parsed content.
    """

    place: str
    text: str
    table: dict[str, Any]

    def place_of(self, location: Sequence[int | str]) -> str:
        """Return `file:line` of a key, or of the nearest table around it that the file has."""
        line = line_of(self.text, location)
        return self.place if line is None else f"{self.place}:{line}"


def line_of(text: str, location: Sequence[int | str]) -> int | None:
    """Return the line (from 1) at which a key is set, or the nearest table around it; None for no line.

    `tomllib` gives no positions. So the text is parsed line by line: a statement ends with the first line
    after which the text so far is whole TOML, and the first statement that sets the key is the one. The line
    of a list entry is the first after which the list, closed there, has that entry.

    Args:
        text: TOML that can be parsed.
        location: keys, and numbers of list entries, from the root.
    """
    parts = list(location)
    lines = text.splitlines(keepends=True)
    first = 0
    line_at_depth: dict[int, int] = {}
    for number in range(1, len(lines) + 1):
        try:
            table = tomllib.loads("".join(lines[:number]))
        except tomllib.TOMLDecodeError:  # in the middle of a list or a text of several lines
            if _closes(lines[:number], parts):
                return number
            continue
        depth_here = _depth_in(table, parts)
        is_last_entry = parts and isinstance(parts[-1], int) and depth_here == len(parts)
        for depth in range(1, depth_here + 1):
            line = number if is_last_entry and depth == len(parts) else first + 1
            line_at_depth.setdefault(depth, line)
        first = number
        if len(parts) in line_at_depth:
            break
    return line_at_depth[max(line_at_depth)] if line_at_depth else None


def _closes(lines: Sequence[str], location: Sequence[int | str]) -> bool:
    """Whether these lines, with the list in them closed, hold the list entry at `location`."""
    if not location or not isinstance(location[-1], int):
        return False
    try:
        table = tomllib.loads("".join(lines) + "\n]")
    except tomllib.TOMLDecodeError:
        return False
    return _depth_in(table, location) == len(location)


def _depth_in(table: Any, location: Sequence[int | str]) -> int:
    """Return how many parts of a location exist in a table."""
    value = table
    for depth, part in enumerate(location):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return depth
    return len(location)


def read_toml(path: Path, missing: str) -> TomlFile:
    """Read and parse a TOML file.

    Args:
        missing: remedy for the error when there is no such file.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not TOML; names the line.
    """
    try:
        text = read_bytes(path, MAX_TOML_BYTES, follows_links=True).decode("utf-8-sig")
        return TomlFile(str(path), text, tomllib.loads(text))
    except FileNotFoundError:
        if path.is_dir():  # `.` has no name to open in its parent
            raise _is_folder(path) from None
        raise ConfigError("no such file", place=str(path), remedy=missing) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise ConfigError(
            f"not readable as TOML: {error}",
            place=f"{path}:{line[1]}" if line else str(path),
            remedy=_remedy_for(str(error)),
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 text: {error.reason} at byte {error.start}",
            place=str(path),
            remedy="name the TOML file itself, saved as UTF-8",
        ) from None
    except OSError as error:
        if path.is_dir():
            raise _is_folder(path) from None
        raise ConfigError(
            f"can't be read: {error.strerror}", place=str(path), remedy="name the TOML file itself"
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(
            "not readable as TOML: a number of thousands of digits, or nested too deep",
            place=str(path),
            remedy="shorten the number, or write the tables flat",
        ) from None


def _is_folder(path: Path) -> ConfigError:
    """Return the error of a folder that was named as a TOML file; it names the TOML files in it."""
    files = ", ".join(sorted(found.name for found in path.glob("*.toml")))
    remedy = f"name a TOML file in it: {files}" if files else "name a TOML file"
    return ConfigError("is a folder", place=str(path), remedy=remedy)


def _remedy_for(message: str) -> str:
    """Return what to do about an error of `tomllib`; a table that stands twice is named."""
    if twice := re.match(r"Cannot declare \((.*?),?\) twice", message):
        table = ".".join(re.findall(r"'([^']*)'", twice[1]))
        return f"[{table}] stands in the file before this line: change the values there, and remove this one"
    return "text stands in quotes, a table's name in [brackets], one `key = value` a line"


def validate(
    model: type[Model],
    data: Mapping[str, Any],
    *,
    place_of: Callable[[Sequence[int | str]], str],
    missing: str = "",
    refused: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
) -> Model:
    """Check parsed TOML against a model.

    Args:
        place_of: returns where a key is set, for errors.
        missing: remedy for the error when a required key is absent.
        refused: keys that are unknown on purpose (`name`, or `table.name`), each with the reason that
            replaces a suggestion; `table.*` is added to the suggestion for any other key of that table.
        hidden: fields of the model that no file may set; they are never suggested.

    Raises:
        ConfigError: the first thing that is wrong: an unknown key (with a suggestion) or a bad value.
    """
    try:
        validated = model.model_validate(data)
        for location, problem in _wrong_values(data, validated):
            key = ".".join(map(str, location))
            raise ConfigError(f"{key}: {problem}", place=place_of(location))
        return validated
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key often also leaves a required one missing: report the spelling first.
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        location = first["loc"]
        if first["type"] == "extra_forbidden":
            key = ".".join(map(str, location))
            reasons = refused or {}
            remedy = reasons.get(key) or reasons.get(str(location[-1])) or _other_file(model, data)
            if not remedy:
                further = reasons.get(f"{key.rpartition('.')[0]}.*")
                suggestion = suggest_key(model, location, hidden)
                remedy = "; ".join(text for text in (suggestion, further) if text)
            raise ConfigError(f"unknown key {key!r}", place=place_of(location), remedy=remedy) from None
        # Where a value may be of several types, each has its own error, with a part of the location that
        # names the type and is no key.
        is_missing = first["type"] == "missing"
        keys = location if is_missing else location[: _depth_in(data, location)]
        of_key = [each for each in errors if each["loc"][: _depth_in(data, each["loc"])] == keys]
        problem = ", or ".join(dict.fromkeys(map(_problem, [first] if is_missing else of_key)))
        remedy = missing if is_missing else ""
        if not keys and (named := _KEY_IN_WORDS.match(problem)):  # of several keys: the first that it names
            raise ConfigError(
                problem, place=place_of((*named[1].split("."), named[2])), remedy=remedy
            ) from None
        key = ".".join(map(str, keys)) or "file"
        raise ConfigError(f"{key}: {problem}", place=place_of(keys), remedy=remedy) from None


def _wrong_values(raw: Any, value: Any, location: tuple[int | str, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Yield the location of each value that pydantic accepts although it is wrong, and what is wrong.

    Values of another type: a file that says `max_tokens = true` is wrong, though Python's numbers include its
    booleans; so is "3" for 3. And text with a null character, which no path, name or text may hold.
    """
    if isinstance(raw, Mapping):
        for name, member in raw.items():
            taken = value.get(name) if isinstance(value, Mapping) else getattr(value, str(name), None)
            yield from _wrong_values(member, taken, (*location, name))
    elif isinstance(raw, list) and isinstance(value, (list, tuple)):
        for index, (member, taken) in enumerate(zip(raw, value, strict=False)):
            yield from _wrong_values(member, taken, (*location, index))
    elif isinstance(value, bool):
        if not isinstance(raw, bool):
            yield location, f"must be true or false, without quotes, not {raw!r}"
    elif isinstance(value, (int, float)) and isinstance(raw, bool):
        yield location, f"must be a number, not {str(raw).lower()}"
    elif isinstance(value, (int, float)) and isinstance(raw, str) and _is_number(raw):
        yield location, f"must be a number, without quotes, not {raw!r}"
    elif isinstance(raw, str) and "\0" in raw:
        yield location, "must not hold a null character"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _problem(error: ErrorDetails) -> str:
    """Say in plain words what is wrong with a value."""
    template = _PROBLEMS.get(error["type"])
    if template is not None:
        return template.format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")


def _other_file(model: type[BaseModel], data: Mapping[str, Any]) -> str:
    """Say whose file this seems to be, if it lacks a required key and holds one of another file; else ""."""
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    return "" if required <= set(data) else file_of_keys(set(data) - set(model.model_fields))


def file_of_keys(keys: Collection[str]) -> str:
    """Say which TOML file these keys belong to, and which commands take it; "" for keys of none."""
    for names, file, commands in _FILES_BY_KEYS:
        if any(name in keys for name in names):
            return f"this looks like a {file}, which is for {commands}"
    return ""


def suggest_key(root: type[BaseModel], location: Sequence[int | str], hidden: Collection[str] = ()) -> str:
    """Suggest a known key for an unknown one: the same word in another table, or the nearest spelling.

    Args:
        location: path to the unknown key from the root of the configuration.
        hidden: fields that no file may set; they are never suggested.

    Returns:
        A remedy for the error; without a near match, the keys that the table knows.
    """
    key, table = str(location[-1]), ".".join(str(part) for part in location[:-1])
    known = [(path, name) for path, name in _known_keys(root) if name not in hidden]
    in_this_table = [name for path, name in known if path == table]
    anywhere: dict[str, str] = {}
    for path, name in known:
        anywhere.setdefault(name, f"{path}.{name}" if path else name)
    if key in anywhere:
        return f"did you mean {anywhere[key]!r}?"
    if near := difflib.get_close_matches(key, in_this_table, n=1):
        return f"did you mean {near[0]!r}?"
    if near := difflib.get_close_matches(key, anywhere, n=1, cutoff=_OTHER_TABLE_CUTOFF):
        return f"did you mean {anywhere[near[0]]!r}?"
    return f"known here: {', '.join(in_this_table)}" if in_this_table else ""


def _known_keys(model: type[BaseModel], table: str = "") -> list[tuple[str, str]]:
    """Every key of a model and its sub-models as (table, key), the outer tables first."""
    keys = [(table, name) for name in model.model_fields]
    for name, field in model.model_fields.items():
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += _known_keys(annotation, f"{table}.{name}" if table else name)
    return keys

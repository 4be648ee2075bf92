"""Read TOML files that an operator wrote, and check their tables against a pydantic model.

Every error names the file, the key or line, and what to write instead. An unknown key is an error that
names the nearest known key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from harvester.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

# Minimum similarity (difflib ratio, 0 to 1) for suggesting a key of another table.
_OTHER_TABLE_CUTOFF = 0.8


def read_toml(path: Path, missing: str) -> dict[str, Any]:
    """Read and parse a TOML file.

    Args:
        missing: remedy for the error when there is no such file.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not TOML; names the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", place=str(path), remedy=missing) from None
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        raise ConfigError(
            f"not readable as TOML: {error}",
            place=f"{path}:{line[1]}" if line else str(path),
            remedy="text stands in quotes, a table's name in [brackets], one `key = value` a line",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8 text: {error.reason} at byte {error.start}",
            place=str(path),
            remedy="name the TOML file itself, saved as UTF-8",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"can't be read: {error.strerror}", place=str(path), remedy="name the TOML file itself"
        ) from None
    except (ValueError, RecursionError):
        raise ConfigError(
            "not readable as TOML: a number of thousands of digits, or nested too deep", place=str(path)
        ) from None


def validate(
    model: type[Model],
    data: Mapping[str, Any],
    *,
    place: str,
    missing: str = "",
    refused: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
) -> Model:
    """Check parsed TOML against a model.

    Args:
        place: the file, for errors.
        missing: remedy for the error when a required key is absent.
        refused: keys that are unknown on purpose (`name`, or `table.name`), each with the reason that
            replaces a suggestion; `table.*` is added to the suggestion for any other key of that table.
        hidden: fields of the model that no file may set; they are never suggested.

    Raises:
        ConfigError: the first thing that is wrong: an unknown key (with a suggestion) or a bad value.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key often also leaves a required one missing: report the spelling first.
        first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
        location = first["loc"]
        key = ".".join(str(part) for part in location) or "file"
        if first["type"] == "extra_forbidden":
            reasons = refused or {}
            remedy = reasons.get(key) or reasons.get(str(location[-1])) or ""
            if not remedy:
                further = reasons.get(f"{key.rpartition('.')[0]}.*")
                suggestion = suggest_key(model, location, hidden)
                remedy = "; ".join(text for text in (suggestion, further) if text)
            raise ConfigError(f"unknown key {key!r}", place=place, remedy=remedy) from None
        message = first["msg"].removeprefix("Value error, ")
        remedy = missing if first["type"] == "missing" else ""
        raise ConfigError(f"{key}: {message}", place=place, remedy=remedy) from None


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

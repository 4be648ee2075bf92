"""A TOML file that an operator wrote: read as it stands, or told in words what is wrong with it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError


def read_toml(path: Path, missing: str) -> dict[str, Any]:
    """A TOML file as it stands; `missing` is the remedy when there is none.

    Raises:
        ConfigError: missing, not UTF-8 or not TOML, with the line.
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

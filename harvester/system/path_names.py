"""Refuse paths that Arrow, safetensors and TOML files can't hold: their names must be UTF-8."""

from __future__ import annotations

import os
from pathlib import Path

from harvester.errors import ConfigError


def require_utf8(path: Path, remedy: str = "rename it") -> None:
    """Do nothing if the absolute path is UTF-8.

    Raises:
        ConfigError: it is not, or the locale of this process can't express it.
    """
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _error(os.fsencode(name), remedy) from None


def error_of_path(error: UnicodeError) -> ConfigError | None:
    """Return what is wrong with the path that could not be encoded; None if no path was meant."""
    if not isinstance(error, UnicodeEncodeError):
        return None
    try:
        name = os.fsencode(error.object)
    except UnicodeEncodeError:  # half a character of a text, which no path holds
        return None
    if b"\n" in name or not (os.path.lexists(name) or os.path.isdir(os.path.dirname(name))):  # noqa: PTH112, PTH120 - bytes
        return None
    return _error(name, "rename it, or name another place")


def _error(name: bytes, remedy: str) -> ConfigError:
    place = name.decode("utf-8", "backslashreplace")
    if place.encode() == name:
        return ConfigError(
            "the locale is not UTF-8: such a name can't be passed on to Parquet",
            place=place,
            remedy="set LC_ALL=C.UTF-8, and not PYTHONUTF8=0",
        )
    return ConfigError(
        "lies under a name that is no UTF-8: Parquet files can't be opened there", place=place, remedy=remedy
    )

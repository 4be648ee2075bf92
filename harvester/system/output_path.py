"""Write a file that an operator named: completely or not at all, and never over a file of the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harvester.errors import ConfigError, StoreError

_FOR_READERS = frozenset({".html", ".prom"})
_REMEDY = "name a file in a folder of your own"


@contextmanager
def replacing(path: Path, store: Path) -> Iterator[Path]:
    """Give a hidden file beside `path`, renamed to `path` when the block ends without an error.

    Raises:
        ConfigError: nothing can be written there, or it is a folder, a device or a file of the store.
    """
    with _config_errors(path):
        _refuse(path, store)
        hidden = _hidden_name(path)
        try:
            yield hidden
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)


def check(path: Path, store: Path) -> None:
    """Check that `path` can be written, by writing and removing a file beside it; raises as `replacing`."""
    with _config_errors(path):
        _refuse(path, store)
        hidden = _hidden_name(path)
        hidden.touch()
        hidden.unlink()


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")  # a collector reads *.prom only


@contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"can't be written: {why}", place=str(path), remedy=_REMEDY) from None


def _refuse(path: Path, store: Path) -> None:
    if not path.name or path.is_dir():
        raise ConfigError("is a folder", place=str(path), remedy=_REMEDY)
    if path.exists() and not path.is_file():
        raise ConfigError("is not a regular file", place=str(path), remedy=_REMEDY)
    folder, inside = path.parent.resolve(), store.resolve()
    if folder.is_relative_to(inside) and (folder != inside or path.suffix not in _FOR_READERS):
        raise ConfigError(
            "lies among the store's own files",
            place=str(path),
            remedy="in the store only NAME.html or NAME.prom",
        )


def check_folder(path: Path) -> None:
    """Check that `path` is a new or empty folder, before any work is done.

    Raises:
        ConfigError: it is not a folder; StoreError: it is not empty.
    """
    try:
        is_used = path.exists() and any(path.iterdir())
    except OSError as error:
        raise _no_folder(path, error) from None
    if is_used:
        raise StoreError("is not empty", place=str(path), remedy="name a new folder")


def folder(path: Path) -> None:
    """Make a folder that an operator named, if it does not exist.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(path, error) from None


def _no_folder(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"can't be a folder: {error.strerror}", place=str(path), remedy="name a new folder")

"""Write a file that an operator named: completely or not at all, and never over a file of the store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from harvester.errors import ConfigError, StoreFull
from harvester.system import disk_refusal, own_files

_READABLE = 0o644
_FOR_READERS = frozenset({".html", ".prom"})
_REMEDY = "name a file in a folder of your own"


@contextmanager
def replacing(path: Path, store: Path, ours: bytes = b"") -> Iterator[BinaryIO]:
    """Give a new file that replaces `path` when the block ends without an error.

    A collector of metrics reads it as another user, so it can be read by everybody, but not in the store.

    Args:
        ours: what every file of this kind begins with: a file that begins otherwise is not replaced.

    Raises:
        ConfigError: nothing can be written there, or it is a folder, a device, a file of the store or one
            of another kind.
        StoreFull: the disk is full.
    """
    with _config_errors(path):
        _refuse(path, store, ours)
        is_inside = path.parent.resolve() == store.resolve() and path.suffix != ".prom"
        with own_files.replacing(path, own_files.PRIVATE if is_inside else _READABLE) as file:
            yield file


def check(path: Path, store: Path, ours: bytes = b"") -> None:
    """Check that `path` can be written, by writing and removing a file beside it; raises as `replacing`."""
    with _config_errors(path):
        _refuse(path, store, ours)
        hidden = own_files.temporary_name(path)
        os.close(own_files.open_file(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        hidden.unlink()


@contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise refused(error, path, _REMEDY) from None


def _refuse(path: Path, store: Path, ours: bytes) -> None:
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
    if ours and path.is_file() and not path.is_symlink() and not _begins_with(path, ours):
        raise ConfigError(
            "another file is there, and would be lost", place=str(path), remedy="name a new file"
        )


def _begins_with(path: Path, ours: bytes) -> bool:
    """Whether a file is empty, or begins so."""
    with path.open("rb") as file:
        start = file.read(len(ours))
    return not start or start == ours


def check_folder(path: Path) -> None:
    """Check that `path` is a new or empty folder, before any work is done.

    Raises:
        ConfigError: it is not a folder, or not empty.
    """
    try:
        is_used = path.exists() and any(path.iterdir())
    except OSError as error:
        raise _no_folder(path, error) from None
    if is_used:
        raise ConfigError("is not empty", place=str(path), remedy="name a new folder")


def folder(path: Path) -> None:
    """Make a folder that an operator named, if it does not exist.

    Raises:
        ConfigError: it can't be made. StoreFull: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise _no_folder(path, error) from None


def refused(error: OSError, path: Path, remedy: str) -> ConfigError | StoreFull:
    """Return the error of a file or folder that an operator named and that can't be written."""
    why = disk_refusal.reason(error)
    if disk_refusal.is_full(error):
        return StoreFull(why, place=str(path), remedy="free space, or name a place on another disk")
    return ConfigError(f"can't be written: {why}", place=str(path), remedy=remedy)


def _no_folder(path: Path, error: OSError) -> ConfigError | StoreFull:
    if disk_refusal.is_full(error):
        return refused(error, path, "")
    why = "it is a file" if path.is_file() else str(error.strerror)
    return ConfigError(f"can't be a folder: {why}", place=str(path), remedy="name a new folder")

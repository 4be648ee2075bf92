"""Open shards only after a check that they are the files that were sealed.

Page checksums of Parquet do not cover page headers and footers: a changed bit there gives fewer rows, other
values, or ends the process inside Arrow. So the size and the SHA-256 of a file are compared with its manifest
row, once in each process, before Arrow reads it. A file without a manifest row is compared with the hash in
its name; one whose name has none is first decoded in a child process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow.parquet as pq

from harvester.errors import StoreCorrupt, StoreError, StoreFormatError
from harvester.store.journal.checksums import translate_value_errors
from harvester.store.journal.records import ShardEntry
from harvester.store.shards.parquet_file import SHARD_NAME, decode_all, open_shard, translate_disk_errors
from harvester.store.shards.swap import locate
from harvester.system.decode_first import UndecodableError, require_decodable
from harvester.system.files import identity_of, sha256_of

_REMEDY = "`harvester verify STORE` names what is damaged, `--repair` keeps what can be read"

# Identity of a file (device, inode, size, time of change) and what it was compared with.
_proved: set[tuple[int, int, int, int, str]] = set()


@contextlib.contextmanager
def open_entry(folder: Path, entry: ShardEntry) -> Iterator[pq.ParquetFile]:
    """Open a shard that the manifest names, in the folder or during an exchange in the staged one.

    Raises:
        StoreError: it is missing; StoreCorrupt: it is not the file that was sealed; StoreFormatError.
    """
    path = locate(folder, entry.name)
    require_proved(path, entry.sha256, entry.size_bytes)
    with open_shard(path) as file, translate_value_errors(path):
        if file.metadata.num_rows != entry.rows:
            raise StoreCorrupt(
                f"{file.metadata.num_rows} rows, {entry.rows} were sealed", place=str(path), remedy=_REMEDY
            )
        yield file


@contextlib.contextmanager
def open_unlisted(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard of a folder without a journal.

    Raises:
        StoreError: it is missing; StoreCorrupt: it is damaged; StoreFormatError.
    """
    require_proved(path, "", 0)
    with open_shard(path) as file, translate_value_errors(path):
        yield file


def require_present(folder: Path, entries: Iterable[ShardEntry]) -> None:
    """Do nothing when each shard of the manifest is there with its size; the bytes are not read.

    A run that found its answers in a shard that is gone would call itself complete.

    Raises:
        StoreCorrupt: one is missing or has another size.
    """
    for entry in entries:
        path = locate(folder, entry.name)
        with translate_disk_errors(path):
            if not path.is_file():
                raise StoreCorrupt("the shard is missing", place=str(path), remedy=_REMEDY)
            _require_size(path, path.stat().st_size, entry.size_bytes)


def require_proved(path: Path, sha256: str, size_bytes: int) -> None:
    """Do nothing when a file is the one that was sealed; its bytes are read once in each process.

    Args:
        sha256: 64 hex digits, "" where no manifest names the file.

    Raises:
        StoreError: it is missing or no regular file; StoreCorrupt: it is another file.
    """
    with translate_disk_errors(path):
        if not path.is_file():
            if path.exists():
                raise StoreError("is not a regular file", place=str(path), remedy="move it away; " + _REMEDY)
            return  # `open_shard` says so
        facts = path.stat()
        identity = (*identity_of(facts), sha256)
        if identity in _proved:
            return
        if sha256:
            _require_size(path, facts.st_size, size_bytes)
        match = SHARD_NAME.match(path.name)
        expected = sha256 or (match[2] if match else "")
        if expected and not sha256_of(path).startswith(expected):
            raise StoreCorrupt(
                "its bytes are not the bytes that were sealed", place=str(path), remedy=_REMEDY
            )
        if not expected:
            _require_decodable(path)
        _proved.add(identity)


def note_written(path: Path, sha256: str) -> None:
    """Note that this process has just written and read back a file, so that it is not read once more."""
    _proved.add((*identity_of(path.stat()), sha256))


def _require_size(path: Path, size_bytes: int, sealed_bytes: int) -> None:
    if size_bytes != sealed_bytes:
        raise StoreCorrupt(f"{size_bytes} bytes, {sealed_bytes} were sealed", place=str(path), remedy=_REMEDY)


def _require_decodable(path: Path) -> None:
    try:
        require_decodable(path, f"{decode_all.__module__}:{decode_all.__name__}")
    except UndecodableError as error:
        if error.kind != StoreFormatError.__name__:  # which opening it here raises too
            raise StoreCorrupt(str(error), place=str(path), remedy=_REMEDY) from None

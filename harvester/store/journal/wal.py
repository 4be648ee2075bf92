"""Find commits in SQLite's write-ahead log that a damaged frame hides.

SQLite reads a log up to the first frame with a wrong checksum and drops the rest without an error. That is
right for a torn last write; but a damaged frame hides all later commits too. The file format is described at
https://sqlite.org/fileformat2.html#walformat
"""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

from harvester.errors import StoreCorrupt
from harvester.store import paths
from harvester.store.journal.lock import is_written
from harvester.store.journal.sqlite import disk_error
from harvester.system.files import identity_of
from harvester.system.own_files import open_file

_HEADER, _FRAME = struct.Struct(">8I"), struct.Struct(">6I")
# The last bit of the header's first word gives the byte order of the checksums: 1 for big-endian.
_MAGIC = 0x377F0682
_PAGE_SIZES = frozenset(1 << bit for bit in range(9, 17))
_MASK = 0xFFFFFFFF
# Logs that this process found whole: device, inode, size and time of change.
_whole: set[tuple[int, int, int, int]] = set()


def log_path(database: Path) -> Path:
    """Return the path of a database's write-ahead log."""
    return database.with_name(f"{database.name}-wal")


def commits_lost(path: Path) -> int:
    """Count the commits after a frame, or a header, whose checksum is wrong; 0 where the log is undamaged.

    A single commit counts as 0: a power failure can leave one that was never acknowledged. With two or more,
    all but the last had been synced before the next began.

    Raises:
        OSError: the file can't be read.
    """
    try:
        with os.fdopen(open_file(path), "rb") as file:
            content = memoryview(file.read())
    except FileNotFoundError:
        return 0
    if len(content) < _HEADER.size + _FRAME.size:
        return 0
    magic, _, page, _, *salts, first, second = _HEADER.unpack_from(content)
    if page not in _PAGE_SIZES:
        page = 4096  # SQLite's default, which the journal uses
    frames = list(_frames(content, page))
    sums = _summed(content[:24], magic, (0, 0))
    complete = 0
    if magic & ~1 == _MAGIC and sums == (first, second):
        for number, _, frame_salts, expected, start in frames:
            sums = _summed(content[start : start + 8], magic, sums)
            sums = _summed(content[start + _FRAME.size : start + _FRAME.size + page], magic, sums)
            if frame_salts != tuple(salts) or sums != expected:
                break
            complete = number + 1
    elif frames:
        salts = list(frames[0][2])
    commits = sum(
        1 for _, size, found_salts, _, _ in frames[complete:] if size and found_salts == tuple(salts)
    )
    return commits if commits > 1 else 0


def require_whole(log: Path) -> None:
    """Do nothing when opening the database loses no acknowledged commit.

    Raises:
        StoreCorrupt: commits would be lost; StoreError: the log can't be read.
    """
    try:
        lost = commits_lost(log)
    except OSError as error:
        raise disk_error(error, log) from None
    if lost:
        raise StoreCorrupt(
            f"{lost} commits lie behind a changed byte",
            place=str(log),
            remedy="`harvester verify PATH --repair` goes on without them; they are asked for again",
        )


def require_whole_for_reading(store: Path) -> None:
    """Do nothing when a reader sees every acknowledged row of a store.

    While a process writes, it has checked the log itself, and readers see what it wrote.

    Raises:
        StoreCorrupt: commits lie behind a changed byte; StoreError: the log can't be read.
    """
    log = log_path(store / paths.JOURNAL)
    try:
        facts = log.stat()
    except OSError:
        return
    identity = identity_of(facts)
    if identity in _whole or is_written(store):
        return
    try:
        require_whole(log)
    except StoreCorrupt:
        if is_written(store):  # a run has begun meanwhile
            return
        raise
    _whole.add(identity)


def _frames(
    content: memoryview, page: int
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]:
    """Yield number, database size in pages (0: no commit), salts, checksum and offset of each whole frame."""
    starts = range(_HEADER.size, len(content) - _FRAME.size - page + 1, _FRAME.size + page)
    for number, start in enumerate(starts):
        _, size, *rest = _FRAME.unpack_from(content, start)
        yield number, size, tuple(rest[:2]), tuple(rest[2:]), start


def _summed(content: memoryview, magic: int, sums: tuple[int, int]) -> tuple[int, int]:
    """Continue the checksum: two 32-bit sums, each over every other word and the other sum."""
    words = array("I", content.tobytes())
    if (sys.byteorder == "big") != bool(magic & 1):
        words.byteswap()
    first, second = sums
    pairs = iter(words)
    for even, odd in zip(pairs, pairs, strict=True):
        first = (first + even + second) & _MASK
        second = (second + odd + first) & _MASK
    return first, second

"""SQLite's write-ahead log looked over, by its file format (https://sqlite.org/fileformat2.html#walformat).

SQLite believes a log up to the first frame whose checksum is wrong, and drops what follows without a word. A
torn last write should end so; a changed byte ends so too, and then whole commits, acknowledged long ago, lie
behind it.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

from harvester.errors import StoreCorrupt
from harvester.store.journal.sqlite import disk_error

_HEADER, _FRAME = struct.Struct(">8I"), struct.Struct(">6I")
_MAGIC = 0x377F0682
"""The last bit of the header's first word says in which order words are summed: 1 for big-endian."""
_PAGES = frozenset(1 << bit for bit in range(9, 17))
_MASK = 0xFFFFFFFF


def log_path(database: Path) -> Path:
    """Where SQLite keeps the log of a database file."""
    return database.with_name(f"{database.name}-wal")


def commits_lost(path: Path) -> int:
    """How many commits lie behind a frame, or a header, whose checksum is wrong; 0 where the log is whole.

    A lone last commit is not counted: a power failure leaves one so that was never acknowledged. With two or
    more, all but the last had been synced before the next began.

    Raises:
        OSError: the file can't be read.
    """
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return 0
    if len(content) < _HEADER.size + _FRAME.size:
        return 0
    magic, _, page, _, *salts, first, second = _HEADER.unpack_from(content)
    if page not in _PAGES:
        page = 4096  # SQLite's own, and ours
    frames = list(_frames(content, page))
    sums = _summed(content[:24], magic, (0, 0))
    whole = 0
    if magic & ~1 == _MAGIC and sums == (first, second):
        for number, _, found, told, start in frames:
            sums = _summed(content[start : start + 8], magic, sums)
            sums = _summed(content[start + _FRAME.size : start + _FRAME.size + page], magic, sums)
            if found != tuple(salts) or sums != told:
                break
            whole = number + 1
    elif frames:
        salts = list(frames[0][2])
    commits = sum(1 for _, size, found, _, _ in frames[whole:] if size and found == tuple(salts))
    return commits if commits > 1 else 0


def require_whole(log: Path) -> None:
    """Do nothing when opening the database loses no acknowledged commit.

    Raises:
        StoreCorrupt: it would; StoreError: the disk refuses.
    """
    try:
        lost = commits_lost(log)
    except OSError as error:
        raise disk_error(error, log) from None
    if lost:
        raise StoreCorrupt(
            f"{lost} commits lie behind a changed byte",
            place=str(log),
            remedy="`harvester verify PATH --repair` goes on without them: their answers are asked again",
        )


def _frames(
    content: memoryview, page: int
) -> Iterator[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]:
    """Number, database size in pages (0: no commit), salts, checksum and place of each whole frame."""
    starts = range(_HEADER.size, len(content) - _FRAME.size - page + 1, _FRAME.size + page)
    for number, start in enumerate(starts):
        _, size, *rest = _FRAME.unpack_from(content, start)
        yield number, size, tuple(rest[:2]), tuple(rest[2:]), start


def _summed(content: memoryview, magic: int, sums: tuple[int, int]) -> tuple[int, int]:
    """The running checksum: two 32-bit sums, each over every other word and the other sum."""
    words = array("I", content.tobytes())
    if (sys.byteorder == "big") != bool(magic & 1):
        words.byteswap()
    first, second = sums
    pairs = iter(words)
    for one, other in zip(pairs, pairs, strict=True):
        first = (first + one + second) & _MASK
        second = (second + other + first) & _MASK
    return first, second

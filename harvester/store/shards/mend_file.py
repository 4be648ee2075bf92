"""Put back the one byte of a shard that changed, where the hash of its manifest row proves it.

Every page of a shard has a CRC-32 in its header (`PageHeader` of parquet.thrift, in Thrift's compact
protocol). It shows which page changed and, for each place in the page, which single byte would explain it.
Whether that is the byte that changed, the SHA-256 of the whole file proves. Headers and footer have no
checksum: there every single bit is tried, and every byte shortly before the place where they can't be read,
within a limit of work.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.system.crc32 import single_byte_changes

# Larger files are not mended byte by byte; their rows are recovered one by one (`recover_rows`).
MOST_BYTES = 256 << 20
# Most bytes that are hashed for changes which no checksum confirms: some seconds.
MOST_HASHED = 1 << 30
# Bytes before a place that can't be read in which every value is tried.
_NEAR_BYTES = 64
# A hash of everything before is kept at every place of this distance.
_STEP_BYTES = 256
_MAGIC = b"PAR1"
# Types of Thrift's compact protocol.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MOST_HEADER_BYTES = 4096
_MOST_LEVELS = 12


@dataclass(frozen=True, slots=True)
class _PageSpan:
    """Where a page lies: its header from `header` to `start`, its bytes up to `end`; None without a CRC."""

    header: int
    start: int
    end: int
    crc: int | None


def mended_content(path: Path, sha256: str, size_bytes: int) -> bytes | None:
    """Return the content of a file as it was sealed; None where it is unchanged or more than a byte changed.

    Raises:
        OSError: the file can't be read.
    """
    if not sha256 or not path.is_file() or not path.stat().st_size == size_bytes <= MOST_BYTES:
        return None
    content = bytearray(path.read_bytes())
    if hashlib.sha256(content).hexdigest() == sha256:
        return None
    damaged = next(filter(None, (_difference(content, page) for page in _pages(content))), None)
    if damaged is None:
        uncovered = _uncovered(content)
        return _with_one_bit_changed(content, sha256, uncovered) or _with_one_byte_changed(content, sha256)
    page, difference = damaged
    for distance, change in single_byte_changes(difference, page.end - page.start):
        place = page.end - 1 - distance
        if _is_sealed(content, place, content[place] ^ change, hashlib.sha256(), 0, sha256):
            return bytes(content)
    return _with_one_bit_changed(content, sha256, [(page.header, page.start)])


def _difference(content: bytearray, page: _PageSpan) -> tuple[_PageSpan, int] | None:
    """Return the page and how its CRC-32 differs from its header; None where it is undamaged."""
    difference = 0 if page.crc is None else zlib.crc32(content[page.start : page.end]) ^ page.crc
    return (page, difference) if difference else None


def _pages(content: bytearray) -> Iterator[_PageSpan]:
    """Yield the pages from the first one on, as long as their headers can be read."""
    footer = _footer_of(content)
    end_of_pages = footer if 0 < footer < len(content) else len(content)
    at = len(_MAGIC)
    while at < end_of_pages:
        page = _page_at(content, at)
        if page is None or page.end > len(content):
            return
        yield page
        at = page.end


def _page_at(content: bytearray, at: int) -> _PageSpan | None:
    reader = _Reader(content, at, min(len(content), at + _MOST_HEADER_BYTES))
    try:
        fields = reader.struct(depth=0)
    except (IndexError, ValueError):
        return None
    size, crc = fields.get(3), fields.get(4)
    if size is None or size < 0 or 1 not in fields:
        return None
    return _PageSpan(at, reader.at, reader.at + size, None if crc is None else crc & 0xFFFFFFFF)


class _Reader:
    """Reads values of Thrift's compact protocol; only integers are kept."""

    def __init__(self, content: bytearray, at: int, end: int) -> None:
        self.at = at
        self._content = content
        self._end = end

    def struct(self, depth: int) -> dict[int, int]:
        """Read a struct; return its integer fields by number.

        Raises:
            IndexError: it does not end; ValueError: it is none.
        """
        if depth > _MOST_LEVELS:
            raise ValueError("nested too deep")
        fields: dict[int, int] = {}
        number = 0
        while head := self._byte():
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            value = self._value(kind, depth)
            if value is not None:
                fields[number] = value
        return fields

    def _value(self, kind: int, depth: int) -> int | None:
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind == _BYTE:
            self._skip(1)
        elif kind == _DOUBLE:
            self._skip(8)
        elif kind == _BINARY:
            self._skip(self._varint())
        elif kind in (_LIST, _SET):
            self._skip_list(depth)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        elif kind not in (_TRUE, _FALSE):
            raise ValueError(f"no type {kind}")
        return None

    def _skip_list(self, depth: int) -> None:
        head = self._byte()
        count = head >> 4
        for _ in range(self._varint() if count == 15 else count):
            if head & 15 in (_TRUE, _FALSE):
                self._skip(1)
            else:
                self._value(head & 15, depth + 1)

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > self._end:
            raise IndexError

    def _byte(self) -> int:
        self._skip(1)
        return self._content[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("no number")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def _with_one_bit_changed(content: bytearray, sha256: str, parts: Sequence[tuple[int, int]]) -> bytes | None:
    """Try each bit of some parts, from the last one on, within `MOST_HASHED` bytes."""
    left = MOST_HASHED
    for start, end in reversed(parts):
        for place, prefix, begun in _places(content, start, end):
            for bit in range(8):
                if _is_sealed(content, place, content[place] ^ (1 << bit), prefix, begun, sha256):
                    return bytes(content)
            left -= 8 * (len(content) - begun)
            if left < 0:
                return None
    return None


def _with_one_byte_changed(content: bytearray, sha256: str) -> bytes | None:
    """Try every byte shortly before the place where headers or footer can no longer be read."""
    broken = _broken_at(content)
    if broken is None or 256 * _NEAR_BYTES * (len(content) - broken) > MOST_HASHED:
        return None
    for place, prefix, begun in _places(content, max(0, broken - _NEAR_BYTES), broken):
        for byte in range(256):
            if _is_sealed(content, place, byte, prefix, begun, sha256):
                return bytes(content)
    return None


def _places(content: bytearray, start: int, end: int) -> Iterator[tuple[int, Any, int]]:
    """Yield the places of a part from its end, each with the hash of all bytes before a place nearby."""
    hashed = hashlib.sha256(content[:start])
    hashes = []
    for begun in range(start, end, _STEP_BYTES):
        hashes.append((begun, hashed.copy()))
        hashed.update(content[begun : begun + _STEP_BYTES])
    for begun, prefix in reversed(hashes):
        for place in range(min(end, begun + _STEP_BYTES) - 1, begun - 1, -1):
            yield place, prefix, begun


def _is_sealed(content: bytearray, place: int, byte: int, prefix: Any, begun: int, sha256: str) -> bool:
    """Whether the file is as it was sealed with this byte; then it is left in `content`."""
    before, content[place] = content[place], byte
    attempt = prefix.copy()
    attempt.update(memoryview(content)[begun:])
    if attempt.hexdigest() == sha256:
        return True
    content[place] = before
    return False


def _broken_at(content: bytearray) -> int | None:
    """Return the place before which a header or the footer is damaged; None where all can be read."""
    footer = _footer_of(content)
    at = len(_MAGIC)
    for page in _pages(content):
        at = page.end
    if at != footer:
        return min(len(content), at + _NEAR_BYTES)
    reader = _Reader(content, footer, len(content) - 8)
    try:
        reader.struct(depth=0)
    except (IndexError, ValueError):
        return min(len(content), reader.at + 4)
    return None if reader.at == len(content) - 8 else len(content)


def _footer_of(content: bytearray) -> int:
    """Return where the footer begins, by the length that the last bytes name; it may be anywhere."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")


def _uncovered(content: bytearray) -> list[tuple[int, int]]:
    """Return the parts of a file that no checksum covers: headers, footer, what follows a broken header."""
    parts, at = [(0, len(_MAGIC))], len(_MAGIC)
    for page in _pages(content):
        parts.append((page.header, page.start))
        at = page.end
    footer = _footer_of(content)
    if at < footer < len(content):  # a broken header: the damage is at its beginning
        parts.append((at, min(footer, at + _MOST_HEADER_BYTES)))
        at = footer
    parts.append((at, len(content)))
    return parts

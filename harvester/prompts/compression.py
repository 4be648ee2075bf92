"""Open prompt files for reading, compressed (`.gz`, `.zst`) or not."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer

COMPRESSED = frozenset({".gz", ".zst"})
BUFFER_BYTES = 1 << 16


class RewrittenError(OSError):
    """A file became another one while it was read."""


def kind_of(path: Path) -> str:
    """Return the suffix that names the file's format, in lower case: `.jsonl` for `a.jsonl.zst`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading; its bytes are decompressed as they are read.

    Raises:
        OSError: it can't be opened. Damaged compressed data raises OSError, EOFError or zlib.error later.
    """
    suffix = path.suffix.lower()
    raw = io.BufferedReader(_Steady(path), buffer_size=BUFFER_BYTES)
    if suffix == ".gz":
        packed = gzip.GzipFile(fileobj=raw)
        packed.myfileobj = raw  # type: ignore[assignment]  # it closes what it opened itself, or what is here
        return cast(BinaryIO, packed)
    if suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, buffer_size=BUFFER_BYTES)
    return raw


class _Steady(io.RawIOBase):
    """The bytes of a file that may grow while it is read, but must not become another one.

    A file that is rewritten in place meanwhile would give a line of which one half is old and one is new: it
    would be asked and paid. When size or time of the file have changed, its beginning and what was read last
    are read again and compared. A change after all of the file was read mixes nothing.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self._facts = self._stat()
        self._head = self._last = b""
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Read the next bytes.

        Raises:
            RewrittenError: those before them are no longer what was read.
        """
        count = self._file.readinto(buffer)
        facts = self._stat()
        if facts != self._facts and (count or not self._is_whole()):
            last_at = self._at - len(self._last)
            if self._differs(0, self._head) or self._differs(last_at, self._last):
                raise RewrittenError("it was rewritten while it was read")
            self._facts = facts
        if count:
            self._last = bytes(memoryview(buffer)[:count])
            self._head = self._head or self._last
            self._at += count
        return count or 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _stat(self) -> tuple[int, int]:
        facts = os.fstat(self._file.fileno())
        return facts.st_size, facts.st_mtime_ns

    def _is_whole(self) -> bool:
        """Whether all of the file was read, in whole lines, as it was at the last look.

        No later look replaces that one while nothing more is read, so what is read after all is compared.
        """
        return self._at == self._facts[0] and self._last.endswith(b"\n")

    def _differs(self, at: int, content: bytes) -> bool:
        return os.pread(self._file.fileno(), len(content), at) != content

"""Open prompt files for reading, compressed (`.gz`, `.zst`) or not."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import BinaryIO, cast

COMPRESSED = frozenset({".gz", ".zst"})


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
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        return io.BufferedReader(stream, buffer_size=1 << 16)
    return path.open("rb")

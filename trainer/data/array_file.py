"""Keep arrays in a file that is whole or counts as absent: NumPy's npz, whose members have checksums."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from harvester.system.files import fsync

# What reading a damaged file may raise.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    zipfile.BadZipFile,
    struct.error,
    zlib.error,
)
# The header of a member of a zip file, of which the bytes of name and extra field are needed (APPNOTE 4.3.7).
_LOCAL_HEADER = struct.Struct("<26xHH")
_HEADERS: Mapping[tuple[int, int], Callable[[BinaryIO], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def write(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays under a temporary name and rename the file.

    Raises:
        OSError: the disk is full or refuses; no file of this name is left half written.
    """
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with hidden.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        fsync(hidden)
        hidden.rename(path)
    finally:
        hidden.unlink(missing_ok=True)


def read(path: Path, names: Collection[str]) -> dict[str, npt.NDArray[Any]] | None:
    """Read the arrays of a file; None where it is absent, damaged, or lacks one of them."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as members:
            if members.testzip() is not None:
                return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
    except _UNREADABLE:
        return None


@dataclass(frozen=True, slots=True)
class ArrayOnDisk:
    """A one-dimensional array in a file of `write`, which is not loaded.

    Attributes:
        offset: of the first value in the file, in bytes.
    """

    offset: int
    dtype: np.dtype[Any]
    size: int

    def offset_of(self, place: int) -> int:
        """Return where one value begins in the file, in bytes.

        Raises:
            IndexError: there is no such place.
        """
        return self.offset + range(self.size)[place] * self.dtype.itemsize


def find(path: Path, names: Collection[str]) -> dict[str, ArrayOnDisk] | None:
    """Find the arrays of a file without loading them; None where it is absent or damaged, or lacks one."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as members:
            if members.testzip() is not None:
                return None
            return {name: _found(file, members.getinfo(f"{name}.npy")) for name in names}
    except _UNREADABLE:
        return None


def _found(file: BinaryIO, member: zipfile.ZipInfo) -> ArrayOnDisk:
    """Find where the values of an array begin.

    Raises:
        ValueError: it is compressed, or has more dimensions than one.
    """
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
    read_header = _HEADERS[np.lib.format.read_magic(file)]
    shape, _, dtype = read_header(file)
    if member.compress_type != zipfile.ZIP_STORED or len(shape) != 1:
        raise ValueError(f"{member.filename} is not an array as `write` keeps it")
    return ArrayOnDisk(file.tell(), dtype, shape[0])

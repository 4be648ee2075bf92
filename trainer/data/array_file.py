"""Keep arrays in a file that is whole or counts as absent: NumPy's npz, whose members have checksums."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

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

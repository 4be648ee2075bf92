"""Make a disk fail on purpose: a library preloaded into a process, and the environment that controls it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def build(folder: Path) -> Path:
    """The library, compiled from `faulty_disk.c`; skips the test where that can't be."""
    if shutil.which("cc") is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    out = folder / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", out, source, "-ldl"], check=True)
    return out


def environment(
    library: Path, under: Path, call: str, nth: int, number: int, stays: bool, after: Path | None = None
) -> dict[str, str]:
    """The n-th such call on a path that holds `under` fails with this errno, all later ones too if it stays.

    Args:
        after: gets a line for each later write and fsync there.
    """
    return {
        "LD_PRELOAD": str(library),
        "FAULT_UNDER": str(under),
        "FAULT_CALL": call,
        "FAULT_NTH": str(nth),
        "FAULT_ERRNO": str(number),
        "PATH": os.environ["PATH"],
        **({"FAULT_STAYS": "1"} if stays else {}),
        **({"FAULT_AFTER": str(after)} if after else {}),
    }

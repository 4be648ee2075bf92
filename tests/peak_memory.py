"""Measure the memory of a process that a test has started, or of a call in its own."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from pathlib import Path


def peak_kib() -> int:
    """Return the most memory that this process had resident since it began its program, in KiB.

    `getrusage` counts from the fork: it returns the peak of the process that started this one, if that was
    larger (`exec_mmap` in Linux's fs/exec.c keeps it).
    """
    return status_kib("VmHWM")


def status_kib(name: str) -> int:
    """Return a size that Linux lists in /proc/self/status, in KiB; `VmRSS` is what is resident now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def most_held(do: Callable[[], object]) -> int:
    """Return the bytes that Python and NumPy hold at most while something is done, its result included."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = do()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak

"""Measure the process: memory, open files, tasks, threads, CPU time, and the delay of the event loop."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

# Seconds between two measurements of the event loop's delay.
PROBE_S = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProcessStats:
    """Figures of this process. `watch` runs on the event loop and records its longest delay."""

    def __init__(self) -> None:
        self._worst_lag_s = 0.0

    async def watch(self) -> None:
        """Sleep for `PROBE_S` until cancelled, and record how much later than due the loop resumed."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._worst_lag_s = max(self._worst_lag_s, loop.time() - due)

    def read(self) -> dict[str, Any]:
        """Return `rss_bytes`, `open_files`, `tasks`, `threads`, `cpu_s` now, and the worst `loop_lag_s`."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "rss_bytes": resident_bytes(),
            "open_files": open_files(),
            "tasks": _tasks(),
            "threads": threading.active_count(),
            "cpu_s": round(used.ru_utime + used.ru_stime, 3),
            "loop_lag_s": round(self._worst_lag_s, 4),
        }

    def start_over(self) -> None:
        """Reset the longest delay to 0."""
        self._worst_lag_s = 0.0


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no loop runs: no tasks
        return 0


def resident_bytes() -> int:
    """Return resident memory now; its peak where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def open_files() -> int:
    """Return the number of open file descriptors; 0 where the system does not list them."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder)) - 1  # noqa: PTH208 - the listing itself is open while it is read
        except OSError:
            continue
    return 0

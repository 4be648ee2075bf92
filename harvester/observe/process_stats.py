"""How the process itself fares: memory, open files, tasks, threads, and how late the event loop is."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any

PROBE_S = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProcessStats:
    """Reads the process; `watch` runs beside the work, on its loop, and keeps the worst lag."""

    def __init__(self) -> None:
        self._worst_lag_s = 0.0

    async def watch(self) -> None:
        """Until cancelled: sleep a little, and note how much later than asked the loop came back."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PROBE_S
            await asyncio.sleep(PROBE_S)
            self._worst_lag_s = max(self._worst_lag_s, loop.time() - due)

    def read(self) -> dict[str, Any]:
        """`rss_bytes`, `open_files`, `tasks`, `threads`, `cpu_s` now, and the worst `loop_lag_s`."""
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
        """Forget the worst lag."""
        self._worst_lag_s = 0.0


def _tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # no loop runs: no tasks
        return 0


def resident_bytes() -> int:
    """Resident set now; where the system does not tell (no /proc), its peak."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def open_files() -> int:
    """Open file descriptors; 0 where nobody can tell."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder)) - 1  # noqa: PTH208 - the listing itself is open while it is read
        except OSError:
            continue
    return 0

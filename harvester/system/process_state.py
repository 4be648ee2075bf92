"""Say in which state another process of this machine is, by proc(5), and how a stopped one goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BY_LETTER = {"T": "stopped", "t": "traced", "Z": "zombie", "D": "waits for the disk"}
# States in which a process does nothing until another one acts.
STANDING = frozenset({"stopped", "traced", "zombie"})


def process_state(holder: Mapping[str, Any]) -> str:
    """Return "runs", "stopped" (after SIGSTOP or Ctrl-Z), "traced", "zombie" or "waits for the disk".

    Args:
        holder: `pid` and `host` of the process, from a file of the store.

    Returns:
        "" for a process of another host, for none, and where there is no /proc.
    """
    if holder.get("host") != os.uname().nodename:
        return ""
    try:
        line = Path(f"/proc/{int(holder['pid'])}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError, TypeError, ValueError, OverflowError):
        return ""
    return _BY_LETTER.get(line.rpartition(")")[2].split()[0], "runs")


def standing_text(state: str, pid: object) -> str:
    """Return what a process that does nothing waits for, and how it goes on; "" for one that runs."""
    return {
        "stopped": f"a signal or Ctrl-Z has stopped it: `kill -CONT {pid}`, or `fg` in its terminal, lets it "
        "go on",
        "traced": "a debugger holds it",
        "zombie": "it has ended, and the process that started it must take note of that",
    }.get(state, "")


def holder_remedy(holder: Mapping[str, Any], otherwise: str) -> str:
    """Return how one gets past a process that holds a lock: how it goes on if it stands, else `otherwise`."""
    return standing_text(process_state(holder), holder.get("pid", "?")) or otherwise

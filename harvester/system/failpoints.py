"""Let a test kill the process, or raise MemoryError, at a named place; off unless the environment sets it.

`HARVESTER_FAILPOINT=shards.before_rename:3` kills the process with SIGKILL when it passes there for the
third time. No handler runs, nothing is flushed: what the kernel does not hold already is gone. With `:memory`
behind it, a MemoryError is raised there instead.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "HARVESTER_FAILPOINT"
_armed, _nth, _kind = (os.environ.get(VARIABLE, "") + "::").split(":")[:3]
_left = int(_nth) if _nth.isdigit() else 1


def reach(name: str) -> None:
    """Kill the process here if the environment says so.

    Raises:
        MemoryError: the environment asks for that instead.
    """
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left == 0 and _kind == "memory":
        raise MemoryError
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

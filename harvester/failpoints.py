"""Places where a test may kill the process: named, and silent unless the environment arms one.

`HARVESTER_FAILPOINT=shards.before_rename:3` kills the process with SIGKILL when it passes there for the
third time. No handler runs, nothing is flushed: what the kernel does not hold already is gone.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "HARVESTER_FAILPOINT"
_armed, _, _nth = os.environ.get(VARIABLE, "").partition(":")
_left = int(_nth) if _nth.isdigit() else 1


def reach(name: str) -> None:
    """Die here if the environment says so."""
    global _left
    if name != _armed:
        return
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

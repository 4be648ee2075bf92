"""Set when Python collects garbage in a process that is one of our commands alone."""

from __future__ import annotations

import functools
import gc

# New objects after which the young ones are looked through, in place of Python's 700. Those of a start are
# modules and classes, which stay: collections among them took a tenth of the time until the first request.
_AT_START = 200_000
_LATER = 30_000


def put_off() -> None:
    """Collect seldom while the command imports its modules; `exempt_modules` ends this."""
    gc.set_threshold(_AT_START)


@functools.cache
def exempt_modules() -> None:
    """Never look through what is loaded now, and collect as usual from now on; once in a process.

    Full collections would look through all modules again and again: a fifth of the time of sealing.
    `gc.get_freeze_count` would walk all of it, too, while no other thread runs.
    """
    gc.freeze()
    gc.set_threshold(_LATER)

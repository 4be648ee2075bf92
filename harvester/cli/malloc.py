"""A process that lives for weeks gives memory back: what its allocators are told before their first use."""

from __future__ import annotations

import ctypes
import os

_M_ARENA_MAX = -8  # malloc.h of glibc


def settle() -> None:
    """One arena of malloc for all threads, and Arrow's memory from it too. Call it before threads and Arrow.

    Each arena keeps the holes that a sealing leaves in it: with one a thread, 10 MiB more with every 100,000
    answers of the first hours. Arrow's own allocators keep another 40 MiB. Nothing is said where the
    platform has no such choice, and what the environment says (MALLOC_ARENA_MAX) wins.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)

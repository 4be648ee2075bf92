"""Configure memory allocation of a process that runs for weeks, so that it returns memory to the system."""

from __future__ import annotations

import ctypes
import os

# M_ARENA_MAX in malloc.h of glibc.
_M_ARENA_MAX = -8


def use_one_arena() -> None:
    """Let all threads and Arrow share one malloc arena. Call it before threads start and Arrow is imported.

    Every arena keeps the holes that sealing a shard leaves in it. Measured: with one arena for each thread, a
    run grew by 10 MiB with every 100,000 answers in its first hours; Arrow's own allocators keep 40 MiB more.
    MALLOC_ARENA_MAX in the environment takes precedence. Does nothing where the C library has no `mallopt`.
    """
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    if "MALLOC_ARENA_MAX" not in os.environ and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)

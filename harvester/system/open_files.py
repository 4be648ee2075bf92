"""Raise the limit of open files (RLIMIT_NOFILE), and say how many connections fit."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator

# File descriptors kept for the journal, shards, prompt files, the control socket and the runtime.
SPARE = 64
SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE})
# Error code of an attempt for which no file descriptor was left.
CODE = "open_files"


def connections_allowed(wanted: int) -> int:
    """Raise RLIMIT_NOFILE if needed; return how many of `wanted` connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + SPARE
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE))


@contextlib.contextmanager
def limit_kept() -> Iterator[None]:
    """Set RLIMIT_NOFILE back to what it was when the block ends."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        yield
    finally:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

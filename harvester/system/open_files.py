"""How many files this process may have open, and how many requests in flight that bears."""

from __future__ import annotations

import errno
import resource

SPARE = 64
"""For the journal, shards being sealed, prompt files, the control socket and the runtime itself."""
SHORTAGE = frozenset({errno.EMFILE, errno.ENFILE})
CODE = "open_files"
"""The error code of an attempt that found no file descriptor left."""


def connections_allowed(wanted: int) -> int:
    """So many of `wanted` connections at once; the soft limit is raised as far as needed and allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = wanted + SPARE
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE))

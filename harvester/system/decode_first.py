"""Decode files of others in a child process before this process does: damage in them may end the process."""

from __future__ import annotations

import resource
from pathlib import Path

from harvester.system.files import identity_of
from harvester.system.limited_child import ChildError, for_files

TIMEOUT_S = 600.0
# What was decoded to its end: identity of the file (device, inode, size, time of change) and the function.
_decodable: set[tuple[int, int, int, int, str]] = set()


class UndecodableError(Exception):
    """A file can't be decoded. `kind` is the class of the exception, "" where the child died or was ended."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


def require_decodable(path: Path, function: str) -> None:
    """Call `function(path)` in a child process, once for each file in each process.

    Args:
        function: `module:name`; it decodes all of the file.

    Raises:
        UndecodableError: it raised something, needs too much memory or time, or ended the child.
        OSError: the file can't be looked at.
    """
    identity = (*identity_of(path.stat()), function)
    if identity in _decodable:
        return
    try:
        for_files.call(function, str(path), timeout_s=TIMEOUT_S)
    except ChildError as error:
        raise UndecodableError(f"can't be decoded: {error}", error.kind) from None
    except TimeoutError:
        raise UndecodableError(f"can't be decoded within {TIMEOUT_S:g} s") from None
    except MemoryError:
        raise UndecodableError(_too_much_memory()) from None
    _decodable.add(identity)


def _too_much_memory() -> str:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return f"is damaged: decoding it ends the process, or takes more than {for_files.memory_gib:g} GiB"
    return (
        f"can't be decoded with the {limit / 2**30:.2g} GiB of memory that a limit of this shell leaves"
        " (`ulimit -v`), or is damaged: raise the limit and try again"
    )

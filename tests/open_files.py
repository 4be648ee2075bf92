"""List the files that a process has open."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def open_files(pid: int) -> set[str]:
    """Return what the descriptors of a process lead to: paths of files, `socket:[INODE]` of sockets.

    A descriptor that is closed while they are listed is left out.
    """
    targets = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            targets.add(str(descriptor.readlink()))
    return targets

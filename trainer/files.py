"""Make written files durable with fsync."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_tree(folder: Path) -> None:
    """Call fsync on every file of a folder and on the folder, before it is renamed to its final name.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.rglob("*")):
        fsync(path)
    fsync(folder)


def fsync(path: Path) -> None:
    """Call fsync on one file or folder.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

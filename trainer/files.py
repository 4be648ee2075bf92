"""Flush files to the disk before others rely on them."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_tree(folder: Path) -> None:
    """Flush every file of a folder and the folder itself, before it gets the name that others open."""
    for path in sorted(folder.rglob("*")):
        fsync(path)
    fsync(folder)


def fsync(path: Path) -> None:
    """Flush one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Hash and lock files, and make writes and renames durable: the helpers that harvester and trainer share."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file's bytes as 64 hex digits.

    Raises:
        OSError: the file can't be read, or is a FIFO or a device, which might be waited for without end.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identity_of(facts: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells whether a file has changed: device, inode, size and time of change in nanoseconds."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def fsync(path: Path) -> None:
    """Call fsync on a file or a folder: a file renamed into a folder is durable only after the folder's.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Call fsync on everything in a folder and on the folder, before it is renamed to its final name.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(folder.rglob("*")):
        fsync(path)
    fsync(folder)


def try_lock(handle: int) -> bool:
    """Take an exclusive `flock` on an open file; False if another process holds it.

    The kernel drops the lock when the handle is closed or the process ends, however it ends.

    Raises:
        OSError: the file system does not lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

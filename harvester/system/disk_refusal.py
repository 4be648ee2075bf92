"""Say in words why the operating system refused to read or write, and what helps."""

from __future__ import annotations

import errno
import os
import re

from harvester.errors import StoreError, StoreFull

# Errors that room on the disk mends.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

# What each error means for a file or folder that a program writes, and what helps.
_WORDS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("this user's quota of the disk is used up", "free some space"),
    errno.EACCES: ("permission denied", "check its owner and permissions"),
    errno.EPERM: ("this user may not do this", "check its owner, permissions and attributes"),
    errno.EROFS: ("the file system is read-only", "name a folder on another"),
    errno.ENOTDIR: ("a file lies where a folder should", "move the file away"),
    errno.EEXIST: ("a file lies where a folder should", "move the file away"),
    errno.EISDIR: ("a folder lies where a file should", "move the folder away"),
    errno.ENOTEMPTY: (
        "what lies there can't be removed",
        "check the owner and permissions of what lies there",
    ),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("a symbolic link leads to itself", "remove the link"),
    errno.EFBIG: ("a file may not be so large here", "raise `ulimit -f`, or name a folder on another disk"),
    errno.EIO: ("the disk reports an error (EIO)", "check the disk, and the kernel's log"),
    errno.ESTALE: ("the file server no longer knows the file", "mount the network file system again"),
}

# How libraries in Rust end the text of an error of the operating system.
_RUST = re.compile(r"\(os error (\d+)\)")


def is_full(error: Exception) -> bool:
    """Whether room on the disk would have helped."""
    return _number(error) in _FULL


def reason(error: Exception) -> str:
    """Return why the operating system refused, in words."""
    number = _number(error)
    told = str(getattr(error, "strerror", None) or "")
    if number not in _WORDS:
        return told or (os.strerror(number) if number else str(error))
    words = _WORDS[number][0]
    return f"{words}: {told}" if told and told != os.strerror(number) else words


def remedy(error: Exception) -> str:
    """Return what helps; empty if that is not known."""
    return _WORDS.get(_number(error), ("", ""))[1]


def place(error: Exception, otherwise: object) -> str:
    """Return the path that the error names, else another.

    A rename names two: then what was to be written is the other.
    """
    named = getattr(error, "filename", None)
    is_one = isinstance(named, (str, bytes, os.PathLike)) and getattr(error, "filename2", None) is None
    return os.fsdecode(named) if is_one and named else str(otherwise)


def refused(
    error: Exception, what: str, path: os.PathLike[str], otherwise: str, *, afterwards: str = ""
) -> StoreError:
    """Return the error of what can't be written or read: `StoreFull` if room on the disk would help.

    Args:
        what: could not be done, as the beginning of the message.
        path: named where the error names none.
        otherwise: what else helps, beside what mends the cause.
        afterwards: what to do then.
    """
    kind = StoreFull if is_full(error) else StoreError
    ways = " or ".join(way for way in (remedy(error), otherwise) if way)
    return kind(
        f"{what}: {reason(error)}",
        place=place(error, path),
        remedy="; ".join(each for each in (ways, afterwards) if each),
    )


def _number(error: Exception) -> int:
    """Return the number of the error; 0 if there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _RUST.search(str(error))
    return int(found[1]) if found else 0

"""Open files of a store safely: never through a symbolic link, only regular files, never waiting for one.

Whoever can write into a folder can put a link, a FIFO or a device in the place of one of its files. A write
through a link would destroy another file of ours; a read of a FIFO would never end. So every file is
opened with `O_NOFOLLOW` and `O_NONBLOCK`, and looked at before its first byte is read or written. Temporary
files get names that can't be guessed and are created with `O_EXCL`.

A folder on the way can be exchanged too. So files are opened relative to a handle of their folder (`openat`),
and while a process holds the lock of a store, that handle is the one of the folder that was locked (`pin`):
another folder or link that gets its name meanwhile is not written into. Folders in the store are opened
without following links.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o600
# A larger file is no configuration.
MAX_TOML_BYTES = 16 << 20
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp(-wal|-shm|-journal)?\Z")


# Folders that this process holds, and their handles.
_pinned: dict[Path, int] = {}


class ForeignFileError(OSError):
    """Something lies in the place of a file that is not a regular file of this user.

    `strerror` says what, as the end of a sentence that begins with the path.
    """


def open_file(
    path: Path, flags: int = os.O_RDONLY, mode: int = PRIVATE, *, follows_links: bool = False
) -> int:
    """Open a regular file and return its handle; for writing it must also belong to this user.

    The superuser may write files of anybody: containers run so on folders of other users.

    Args:
        follows_links: for files that the operator named, which may be links.

    Raises:
        ForeignFileError: it is a link, a FIFO, a device, a folder, or another user's.
        OSError: it can't be opened.
    """
    with open_folder(path.parent) as folder:
        return _open_in(folder, path, flags, mode, follows_links=follows_links)


def _open_in(folder: int, path: Path, flags: int, mode: int, *, follows_links: bool = False) -> int:
    """Open a file of a folder that is open; see `open_file`."""
    try:
        links = 0 if follows_links else os.O_NOFOLLOW
        handle = os.open(path.name, flags | links | os.O_NONBLOCK | os.O_CLOEXEC, mode, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ELOOP and not follows_links:
            raise _foreign(path, "is a symbolic link") from None
        if error.errno in {errno.ENXIO, errno.EISDIR, errno.ENODEV}:  # FIFO without reader, folder, socket
            raise _foreign(path, "is not a regular file") from None
        error.filename = str(path)
        raise
    try:
        _require_regular(path, os.fstat(handle), writing=flags & os.O_ACCMODE != os.O_RDONLY)
    except BaseException:
        os.close(handle)
        raise
    return handle


def pin(folder: Path, handle: int) -> None:
    """Open files of this folder relative to its handle from now on, until `unpin`."""
    _pinned[folder] = handle


def unpin(folder: Path, handle: int) -> None:
    """End what `pin` began with this handle."""
    if _pinned.get(folder) == handle:
        del _pinned[folder]


def is_in_place(folder: Path) -> bool:
    """Return whether the name of a pinned folder still leads to it; True for a folder that is not pinned."""
    handle = _pinned.get(folder)
    if handle is None:
        return True
    try:
        return os.path.samestat(folder.stat(), os.fstat(handle))
    except OSError:
        return False


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Give a handle of a folder: of the pinned one, of one in it, or by its name.

    Raises:
        ForeignFileError: a link lies in the place of a folder of the store. OSError: it can't be opened.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    if folder in _pinned:
        handle = os.dup(_pinned[folder])
    elif folder.parent in _pinned:
        try:
            handle = os.open(folder.name, flags | os.O_NOFOLLOW, dir_fd=_pinned[folder.parent])
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR}:
                raise _foreign(folder, "is not a folder of the store") from None
            error.filename = str(folder)
            raise
    else:
        handle = os.open(folder, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def require_regular(path: Path, *, writing: bool) -> None:
    """Do nothing when there is a regular file, or nothing, under this name.

    For files that another library opens by their name.

    Raises:
        ForeignFileError: see `open_file`. OSError: it can't be looked at.
    """
    with suppress(FileNotFoundError), open_folder(path.parent) as folder:
        _require_regular(path, os.stat(path.name, dir_fd=folder, follow_symlinks=False), writing=writing)


def _require_regular(path: Path, facts: os.stat_result, *, writing: bool) -> None:
    if stat.S_ISLNK(facts.st_mode):
        raise _foreign(path, "is a symbolic link")
    if not stat.S_ISREG(facts.st_mode):
        raise _foreign(path, "is not a regular file")
    if writing and facts.st_uid != os.geteuid() != 0:
        raise _foreign(path, f"belongs to another user (uid {facts.st_uid})")


def _foreign(path: Path, message: str) -> ForeignFileError:
    return ForeignFileError(errno.EINVAL, message, str(path))


def read_bytes(path: Path, limit_bytes: int, *, follows_links: bool = False) -> bytes:
    """Return the content of a regular file of at most this size.

    Raises:
        ForeignFileError: it is larger, or see `open_file`. OSError: it can't be read.
    """
    with os.fdopen(open_file(path, follows_links=follows_links), "rb") as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise _foreign(path, f"is larger than {limit_bytes / 2**20:g} MiB")
    return content


def read_text(path: Path, limit_bytes: int) -> str:
    """Return the content of a regular file as text; bytes that are not UTF-8 become replacement characters.

    Raises:
        as `read_bytes`.
    """
    return read_bytes(path, limit_bytes).decode("utf-8", "replace")


def append(path: Path, content: bytes) -> None:
    """Append to a regular file of ours; create it for this user only where there is none.

    Raises:
        ForeignFileError: see `open_file`. OSError: it can't be written.
    """
    with os.fdopen(open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        file.write(content)


def remove(path: Path) -> None:
    """Remove a file, if it is there.

    Raises:
        OSError: it can't be removed.
    """
    with suppress(FileNotFoundError), open_folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that nobody can guess; `remove_temporary` knows its form."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def replacing(path: Path, mode: int = PRIVATE, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Give a new file that replaces `path` when the block ends without an error, and is removed otherwise.

    A link in the place of `path` is replaced itself; what it points at stays as it is.

    Args:
        mode: permissions, before the umask.
        durable: call fsync before the file replaces the other.

    Raises:
        OSError: it can't be written.
    """
    hidden = temporary_name(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    with open_folder(path.parent) as folder, os.fdopen(_open_in(folder, hidden, flags, mode), "wb") as file:
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(hidden.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(hidden.name, dir_fd=folder)
            raise


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder. Only its lock's holder may do so."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _TEMPORARY.match(path.name) and not path.is_dir():
                path.unlink(missing_ok=True)

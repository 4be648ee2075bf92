"""One folder of shards put in another's place at one instant, when nobody reads there.

A plain reader lists the folder and then opens what it listed; files replaced one by one would show it rows
twice, or not at all. So the next folder is built beside it from hard links, and the two change names in one
call of the kernel: a kill leaves one or the other, whole. What remains is a reader that listed before and
opens after; `Watch` sees plain readers come and go, `reading` is how our own say that they are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from harvester.store.shards.parquet_file import SHARD_NAME
from harvester.system.files import sync_folder

STAGED = ".shards.next"
"""Beside `shards`: the folder that will take its place, or the one that had it."""
ASIDE = ".shards.aside"
_LOOK_AGAIN_S = 0.05
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_IN_ACCESS, _IN_OPEN = 0x1, 0x20  # inotify(7)
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_libc = ctypes.CDLL(None, use_errno=True)


def stage(folder: Path, *, without: Collection[str], new: tuple[Path, str] | None) -> None:
    """Build the next folder: all of this one's files but some, and a hidden file under its name.

    Raises:
        OSError: the disk refuses; this folder is as it was.
    """
    staged = folder.with_name(STAGED)
    discard(folder)
    staged.mkdir(mode=0o700)
    staged.chmod(stat.S_IMODE(folder.stat().st_mode))
    for path in sorted(folder.iterdir()):
        if path.name in without or _is_half(path):
            continue
        if path.is_symlink():
            (staged / path.name).symlink_to(path.readlink())
        elif not path.is_dir():
            _link(path, staged / path.name)
    if new is not None:
        _link(new[0], staged / new[1])
    sync_folder(staged)


def exchange(folder: Path) -> None:
    """Let the folder and its staged successor change names, durably.

    Raises:
        OSError: the disk refuses.
    """
    staged = folder.with_name(STAGED)
    if not _renamed_at_once(folder, staged):
        # Not on every file system: for an instant the folder has no name, and `resume` knows the way on.
        aside = folder.with_name(ASIDE)
        folder.rename(aside)
        staged.rename(folder)
        aside.rename(staged)
    for path in staged.iterdir():
        is_new = not (folder / path.name).exists() and not (folder / path.name).is_symlink()
        if is_new and not _is_half(path) and SHARD_NAME.match(path.name) is None:
            path.rename(folder / path.name)  # a directory, which has no hard links, or one that came just now
    sync_folder(folder.parent)


def finish_interrupted(folder: Path) -> bool:
    """Finish an exchange in three renames that a kill cut short; whether a staged folder is left."""
    staged, aside = folder.with_name(STAGED), folder.with_name(ASIDE)
    if aside.exists():
        if folder.exists():
            discard(folder)
            aside.rename(staged)
        else:
            aside.rename(folder)
    return staged.exists()


def discard(folder: Path) -> None:
    """Remove what is staged beside the folder."""
    staged = folder.with_name(STAGED)
    if staged.exists():
        shutil.rmtree(staged)


def locate(folder: Path, name: str) -> Path:
    """Where a file of the manifest lies: in the folder, or beside it while an exchange is under way."""
    path = folder / name
    if not path.exists():
        beside = folder.with_name(STAGED) / name
        if beside.exists():
            return beside
    return path


@contextlib.contextmanager
def hold_for_reading(folder: Path) -> Iterator[None]:
    """Keep the folder as it is: nothing is merged meanwhile. An flock on the directory; writes nothing."""
    handle = _shared(folder)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def if_no_reader(folder: Path, patience_s: float = 0.0) -> Iterator[bool]:
    """Whether no reader of ours holds the folder; new ones wait until the block has ended.

    What is staged beside it is held along: inside the block it may take the folder's name.

    Args:
        patience_s: how long to wait for readers to end.
    """
    until = time.monotonic() + patience_s
    with contextlib.ExitStack() as held:
        for each in (folder, folder.with_name(STAGED)):
            if each != folder and not each.exists():
                continue
            handle = os.open(each, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, handle)
            if not _locked(handle, until):
                held.close()
                yield False
                return
        yield True


class ReaderWatch:
    """Sees who opens or reads anything in a folder, from now until `close` (inotify, Linux)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = -1
        self.renew()

    def renew(self) -> None:
        """Begin again, with the folder that has the name now."""
        self.close()
        with contextlib.suppress(AttributeError):
            self._handle = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._handle >= 0:
                _libc.inotify_add_watch(self._handle, os.fsencode(self._folder), _IN_OPEN | _IN_ACCESS)

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def is_quiet(self) -> bool:
        """Whether nobody came since it was last asked, or began; False where the kernel can't tell."""
        if self._handle < 0:
            return False
        try:
            return not os.read(self._handle, 1 << 16)
        except BlockingIOError:
            return True


def _is_half(path: Path) -> bool:
    """Whether it is a shard that was being written; any other hidden file is somebody's own."""
    return path.name.startswith(".part-") and path.suffix == ".tmp"


def _renamed_at_once(one: Path, other: Path) -> bool:
    try:
        call = _libc.renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one))


def _link(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EMLINK, *_UNSUPPORTED}:
            raise
        with path.open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _locked(handle: int, until: float) -> bool:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_AGAIN_S)  # flock has no wait with an end
        else:
            return True


def _shared(folder: Path) -> int:
    """A handle with a shared lock on what the folder's name stands for now; -1 where it can't be had."""
    while True:
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return -1
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.fstat(handle).st_ino == folder.stat().st_ino:
                return handle
        except OSError:  # a place without flock has no writer either
            os.close(handle)
            return -1
        os.close(handle)  # it was exchanged while we waited

"""Replace the folder of shards atomically, while no reader uses it.

A reader lists the folder and then opens the files. If files were replaced one by one it could see rows twice
or not at all. So the next folder is built from hard links, and the two folders exchange their names in one
system call; after a kill there is one or the other. A reader may still have listed the old folder:
`ReaderWatch` detects readers of any program, `hold_for_reading` is the lock that readers of this program
take. What a reader that takes no lock can rely on is written in FORMAT.md, under Merging.
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
from harvester.system.files import fsync, try_lock

# Next to `shards`: the folder that will replace it, or the one that was replaced.
STAGED = ".shards.next"
ASIDE = ".shards.aside"
_LOOK_AGAIN_S = 0.05
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h
_IN_ACCESS, _IN_OPEN = 0x1, 0x20  # inotify(7)
_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP})
_libc = ctypes.CDLL(None, use_errno=True)


def stage(folder: Path, *, without: Collection[str], new: tuple[Path, str] | None) -> None:
    """Build the next folder: the files of this one except `without`, and a new file under its final name.

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
            link(path, staged / path.name)
    if new is not None:
        link(new[0], staged / new[1])
    fsync(staged)


def exchange(folder: Path, readers: ReaderWatch | None = None) -> bool:
    """Exchange the names of the folder and the staged one, durably; return whether the exchange stands.

    Args:
        readers: watches the folder and was quiet just now. If somebody opened the folder since, the exchange
            is undone at once: that reader finds the files that it has listed.

    Raises:
        OSError: the disk refuses.
    """
    staged = folder.with_name(STAGED)
    _exchange_names(folder, staged)
    if readers is not None and not readers.is_quiet():
        _exchange_names(folder, staged)
        return False
    for path in staged.iterdir():
        is_new = not (folder / path.name).exists() and not (folder / path.name).is_symlink()
        if is_new and not _is_half(path) and SHARD_NAME.match(path.name) is None:
            path.rename(folder / path.name)  # a directory, which has no hard links, or one that came just now
    fsync(folder.parent)
    return True


def finish_interrupted(folder: Path) -> bool:
    """Finish an exchange by three renames that a kill interrupted; return whether a staged folder is left."""
    staged, aside = folder.with_name(STAGED), folder.with_name(ASIDE)
    if aside.exists():
        if folder.exists():
            discard(folder)
            aside.rename(staged)
        else:
            aside.rename(folder)
    return staged.exists()


def discard(folder: Path) -> None:
    """Remove the staged folder."""
    staged = folder.with_name(STAGED)
    if staged.exists():
        shutil.rmtree(staged)


def locate(folder: Path, name: str) -> Path:
    """Return the path of a shard: in the folder, or in the staged one during an exchange."""
    path = folder / name
    if not path.exists():
        staged = folder.with_name(STAGED) / name
        if staged.exists():
            return staged
    return path


@contextlib.contextmanager
def hold_for_reading(folder: Path) -> Iterator[None]:
    """Prevent exchanges of the folder during the block, with a shared flock on the directory."""
    handle = _shared(folder)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


@contextlib.contextmanager
def if_no_reader(folder: Path, patience_s: float = 0.0, readers: ReaderWatch | None = None) -> Iterator[bool]:
    """Give whether no reader of this program holds the folder; new readers wait until the block ends.

    The staged folder is locked too, because inside the block it may get the folder's name.

    Args:
        patience_s: how long to wait for readers to end.
        readers: watches the folder, which is then locked without opening it: the watch would see that.
    """
    until = time.monotonic() + patience_s
    with contextlib.ExitStack() as held:
        for directory in (folder, folder.with_name(STAGED)):
            if directory != folder and not directory.exists():
                continue
            if readers is not None and readers.directory >= 0 and directory == folder:
                handle = readers.directory
                held.callback(fcntl.flock, handle, fcntl.LOCK_UN)
            else:
                handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                held.callback(os.close, handle)
            if not _locked(handle, until):
                held.close()
                yield False
                return
        yield True


class ReaderWatch:
    """Detects that any process opens or reads a file of a folder, until `close` (inotify, Linux).

    Attributes:
        directory: open handle of the folder, which has been open since before the watch began.
    """

    def __init__(self, folder: Path, quiet_s: float) -> None:
        """Watch a folder; it counts as quiet after `quiet_s` seconds without access."""
        self._folder = folder
        self._quiet_s = quiet_s
        self._handle = self.directory = -1
        self.renew()

    def renew(self) -> None:
        """Begin again, with the folder that has the name now."""
        self.close()
        with contextlib.suppress(AttributeError, OSError):  # a system without inotify, no folder
            self.directory = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._handle = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
            if self._handle >= 0:
                _libc.inotify_add_watch(self._handle, os.fsencode(self._folder), _IN_OPEN | _IN_ACCESS)
        self._last_access = time.monotonic()

    def close(self) -> None:
        """Stop watching. Safe to call twice."""
        for handle in (self._handle, self.directory):
            if handle >= 0:
                os.close(handle)
        self._handle = self.directory = -1

    def is_quiet(self) -> bool:
        """Return whether nobody has opened or read anything for `quiet_s`; False where inotify is missing.

        The kernel does not say when an access was: it counts as of the call that sees it.
        """
        if self._handle < 0:
            return False
        with contextlib.suppress(BlockingIOError):
            while os.read(self._handle, 1 << 16):
                self._last_access = time.monotonic()
        return time.monotonic() - self._last_access >= self._quiet_s


def _is_half(path: Path) -> bool:
    """Return whether it is an unfinished shard; other hidden files belong to other programs."""
    return path.name.startswith(".part-") and path.suffix == ".tmp"


def _exchange_names(folder: Path, staged: Path) -> None:
    if not _renamed_at_once(folder, staged):
        # Not every file system can exchange names. Between the renames there is no folder;
        # `finish_interrupted` completes them after a kill.
        aside = folder.with_name(ASIDE)
        folder.rename(aside)
        staged.rename(folder)
        aside.rename(staged)


def _renamed_at_once(first: Path, second: Path) -> bool:
    try:
        call = _libc.renameat2
    except AttributeError:
        return False
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(first))


def link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such links.

    Raises:
        OSError: the disk refuses.
    """
    try:
        target.hardlink_to(path)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.EMLINK, errno.EXDEV, *_UNSUPPORTED}:
            raise
        with path.open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _locked(handle: int, until: float) -> bool:
    while not try_lock(handle):
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_AGAIN_S)  # flock has no wait with an end
    return True


def _shared(folder: Path) -> int:
    """Return a handle with a shared lock on the folder of this name; -1 where it can't be locked."""
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

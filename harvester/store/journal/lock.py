"""Lock a store for one process with `flock`, and say which process holds it.

The kernel releases the lock when the process dies, so there are no stale locks; the content of LOCK (pid,
host, start) is only used in messages. The folder is locked as well as the file LOCK, because the file can be
removed while it is locked. Network file systems are refused: flock and SQLite's shared memory are not
reliable on them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from harvester.errors import StoreError, StoreLocked
from harvester.store import paths
from harvester.store.journal.sqlite import disk_error
from harvester.system import own_files
from harvester.system.files import try_lock
from harvester.system.own_files import ForeignFileError, open_file, read_text, remove_temporary
from harvester.system.process_state import holder_remedy

NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "ceph",
        "glusterfs",
        "lustre",
        "beegfs",
        "gpfs",
        "afs",
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.gcsfuse",
        "fuse.rclone",
        "fuse.juicefs",
    }
)
# `is_held` takes the lock for an instant; taking the lock waits this long for it.
PATIENCE_S = 0.2
# Most bytes of LOCK that are read; it has about 80.
MAX_NOTE_BYTES = 1 << 16
_MOUNTS = Path("/proc/self/mountinfo")


class StoreLock:
    """Context manager around `store/LOCK`.

    Raises:
        StoreLocked: another process holds it (exit 75); names pid and host.
        StoreError: the folder can't be made or written, or lies on a network file system.
    """

    def __init__(self, store: Path, *, started_at: float) -> None:
        self._path = store / paths.LOCK
        self._note = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": started_at}
        self._handles: list[int] = []

    def __enter__(self) -> StoreLock:
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            refuse_network_file_system(folder)
            self._handles.append(open_file(self._path, os.O_RDWR | os.O_CREAT))
            self._handles.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            if self._take():
                os.ftruncate(self._handles[0], 0)
                os.pwrite(self._handles[0], json.dumps(self._note).encode(), 0)
                remove_temporary(folder)
                own_files.pin(folder, self._handles[1])
                return self
        except OSError as error:
            self._close()
            raise disk_error(error, self._path) from None
        except BaseException:
            self._close()
            raise
        holder = read_holder(self._path)
        self._close()
        raise StoreLocked(
            f"held by pid {holder.get('pid', '?')} on {holder.get('host', '?')}",
            place=str(self._path),
            remedy=holder_remedy(
                holder, "`harvester attach` shows it until it ends, `harvester stop` ends it"
            )
            + "; no request was sent",
        )

    def _take(self) -> bool:
        until = time.monotonic() + PATIENCE_S
        for handle in self._handles:
            while not try_lock(handle):
                if time.monotonic() >= until:
                    return False
                time.sleep(0.005)
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # its content is only used in messages
            os.ftruncate(self._handles[0], 0)
        self._close()

    def _close(self) -> None:
        if len(self._handles) > 1:
            own_files.unpin(self._path.parent, self._handles[1])
        while self._handles:
            os.close(self._handles.pop())  # closing drops the lock


def read_holder(path: Path) -> dict[str, object]:
    """Return the content of a LOCK file; empty when it can't be read."""
    try:
        loaded = json.loads(read_text(path, MAX_NOTE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def is_held(store: Path) -> bool:
    """Return whether a live process holds the lock now; the kernel answers, not the content of LOCK.

    Raises:
        StoreError: something other than a file of the harvester lies in the place of LOCK.
    """
    handles = []
    try:
        handles.append(open_file(store / paths.LOCK))
    except ForeignFileError as error:
        raise disk_error(error, store / paths.LOCK) from None
    except OSError:  # there is none, or it is another user's
        pass
    with contextlib.suppress(OSError):
        handles.append(os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    locked = [_is_locked(handle) for handle in handles]  # closes all of them
    return any(locked)


def is_held_by(store: Path, holder: dict[str, Any]) -> bool:
    """Return whether this process still holds the lock, and no other.

    Args:
        holder: what `read_holder` returned while it held it. It removes its note before it releases the lock.
    """
    return is_held(store) and read_holder(store / paths.LOCK) in ({}, holder)


def is_written(store: Path) -> bool:
    """Return whether a process writes here; the canary store is written under the lock of its parent."""
    return is_held(store) or (store.name == paths.CANARY and is_held(store.resolve().parent))


def _is_locked(handle: int) -> bool:
    """Return whether another process has locked the file of this handle; close the handle."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def refuse_network_file_system(folder: Path, mounts: Path = _MOUNTS) -> None:
    """Raise StoreError when `folder` lies on a file system that can't keep a lock."""
    kind = file_system_of(folder.resolve(), mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"lies on {kind}: flock and SQLite's write-ahead log are not safe on network file systems",
            place=str(folder),
            remedy="keep the store on a local disk and export from it",
        )


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system of `folder` from /proc/self/mountinfo (proc(5)), '' if unknown."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        mount = Path(fields[4].replace("\\040", " "))
        if folder.is_relative_to(mount) and len(mount.parts) >= best:  # later mounts hide earlier ones
            best, kind = len(mount.parts), right.split(" ")[0]
    return kind

"""Remember the hash of a large base between processes, so that not every command reads all of it again.

The memory is a file of the user's own in the cache folder (`$XDG_CACHE_HOME`, else `~/.cache`). A hash is
known by path, size, inode, device and both times of every file. The change time can't be set back by a
program, so a base that was exchanged and given its old modification time is read anew. The file is ignored if
another user could have written it. What goes into documents of a student is never taken from here: it is
computed from the content (`weights.content_sha256`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

# Bases below this size are not remembered: reading them takes a second at most.
MIN_BYTES = 1 << 28

# A base that changed less than this many seconds ago is not remembered: the clock of a file system may give a
# further change the same time.
MIN_AGE_S = 5.0

# Entries that are kept, the newest last.
MAX_ENTRIES = 64

_FILE = Path("trainer", "base_hashes.json")

# A file as path, size, inode, device, modification time and change time in nanoseconds.
FileIdentity = tuple[str, int, int, int, int, int]


def identity(path: Path) -> FileIdentity:
    """Return what a file is known by."""
    status = path.stat()
    return (
        *(str(path.absolute()), status.st_size, status.st_ino, status.st_dev),
        *(status.st_mtime_ns, status.st_ctime_ns),
    )


def recall(files: tuple[FileIdentity, ...]) -> str:
    """Return the remembered hash of files, empty if there is none."""
    if sum(size for _, size, *_ in files) < MIN_BYTES:
        return ""
    return _read().get(_key(files), "")


def remember(files: tuple[FileIdentity, ...], sha256: str) -> None:
    """Remember a hash. Does nothing for small or just changed files, or if the memory can't be written."""
    newest = max(change for *_, change in files) / 1e9
    if sum(size for _, size, *_ in files) < MIN_BYTES or time.time() - newest < MIN_AGE_S:
        return
    entries = {key: value for key, value in _read().items() if key != _key(files)}
    entries[_key(files)] = sha256
    kept = dict(list(entries.items())[-MAX_ENTRIES:])
    path = _path()
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)  # readable by this user only
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(kept, file, indent=1)
        Path(temporary).replace(path)


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / _FILE


def _key(files: tuple[FileIdentity, ...]) -> str:
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _read() -> dict[str, str]:
    """Read the memory; empty if it is absent, damaged, or another user could have written it."""
    try:
        with _path().open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return {}
            stored = json.load(file)
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: value for key, value in stored.items() if isinstance(value, str) and len(value) == 64}

"""Keep downloaded objects on disk, by their SHA-256, so that each is downloaded once.

They lie in `$XDG_CACHE_HOME/harvester/objects` (default: `~/.cache`). The folder may be deleted at any time.
An object in it is whole, for it gets its name when its bytes were verified.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from harvester.errors import StoreError
from harvester.system import disk_refusal
from harvester.system.failpoints import reach
from harvester.system.files import sha256_of
from harvester.system.objects.location import Location
from harvester.system.objects.publication import PublishedObject
from harvester.system.objects.transfer import download


def cache_folder() -> Path:
    """Return the folder of this program in the user's cache, as the XDG Base Directory Specification says.

    Raises:
        StoreError: the user has no home folder.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (folder if folder.is_absolute() else Path.home() / ".cache") / "harvester"
    except RuntimeError as error:
        raise StoreError(str(error), place="~/.cache", remedy="set XDG_CACHE_HOME to a folder") from None


def fetched(location: Location, published: PublishedObject, *, verify: bool = False) -> Path:
    """Return the path of an object in the cache; download and verify it first where it is not there.

    Args:
        verify: read one that is there already, and download it again if its bytes have changed on disk.

    Raises:
        RemoteStoreError: it is not there, or can't be read. StoreCorrupt: it is not what was published.
        StoreFull, StoreError: the cache can't be written.
    """
    folder = cache_folder() / "objects" / published.sha256[:2]
    path = folder / published.sha256
    try:
        is_there = path.is_file() and path.stat().st_size == published.size_bytes
        if is_there and (not verify or sha256_of(path) == published.sha256):
            return path
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, hidden = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                download(location, published, file)
                reach("fetch.before_rename")
            Path(hidden).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(hidden).unlink()
            raise
    except OSError as error:
        raise refused(error, "the cache can't be written", path) from None
    return path


def refused(error: OSError, what: str, path: Path) -> StoreError:
    """Return the error of a cache that can't be written; arguments as `disk_refusal.refused`."""
    return disk_refusal.refused(error, what, path, "name another folder in XDG_CACHE_HOME")


def forget(published: PublishedObject) -> None:
    """Remove an object from the cache: its bytes have changed on disk."""
    with contextlib.suppress(OSError):
        (cache_folder() / "objects" / published.sha256[:2] / published.sha256).unlink()

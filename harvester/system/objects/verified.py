"""Remember which objects were read back, so that the next publication need not read them again.

One small JSON file for each URL, in the user's state folder. An object counts as unchanged while size and
time of writing are those that the storage showed when it was verified. Without the file all are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import orjson

from harvester.system.objects.publication import PublishedObject
from harvester.system.objects.transfer import Seen


def state_folder() -> Path:
    """Return the folder of the user's state for this program, as the XDG Base Directory Specification says.

    Raises:
        RuntimeError: the user has no home folder.
    """
    folder = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".local" / "state") / "harvester"


class VerifiedObjects:
    """What was verified at one URL.

    Args:
        url: of the publication, without options.
    """

    def __init__(self, url: str) -> None:
        self._path: Path | None = None
        self._known: dict[str, list[int | str]] = {}
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            digest = hashlib.sha256(url.encode()).hexdigest()[:32]
            self._path = state_folder() / "published" / f"{digest}.json"
            known = orjson.loads(self._path.read_bytes())
            if isinstance(known, dict):
                self._known = known

    def holds(self, published: PublishedObject, seen: Seen) -> bool:
        """Whether this object was verified, and has not been written since."""
        return self._known.get(published.name) == [published.sha256, seen.size_bytes, seen.written_ns]

    def add(self, published: PublishedObject, seen: Seen) -> None:
        """Note that an object was just read back. Where the storage tells no time, it will be again."""
        if seen.written_ns > 0:
            self._known[published.name] = [published.sha256, seen.size_bytes, seen.written_ns]

    def save(self, names: frozenset[str]) -> None:
        """Write the file with these objects. A folder that can't be written costs nothing but time."""
        if self._path is None:
            return
        self._known = {name: facts for name, facts in self._known.items() if name in names}
        hidden = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            hidden.write_bytes(orjson.dumps(self._known))
            hidden.replace(self._path)

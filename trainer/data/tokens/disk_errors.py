"""Name what a disk refuses while a token store is written. Loads no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from harvester.system import disk_refusal


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses while rows are tokenised or chosen into an error with a remedy.

    Args:
        folder: named where the error names no file.

    Raises:
        StoreFull, StoreError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise disk_refusal.refused(
            error,
            "the token store can't be written",
            folder,
            "set [data] cache to a folder on another disk",
            afterwards="what is done stays",
        ) from None

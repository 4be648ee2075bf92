"""Name what a disk refuses while a token store is written. Loads no torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import StoreError, StoreFull


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
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = StoreFull if full else StoreError
        raise kind(
            f"the token store can't be written: {error.strerror or error}",
            place=str(error.filename or folder),
            remedy=(
                "free some space, or set [data] cache to a folder on another disk; what is done stays"
                if full
                else "set [data] cache to a folder that can be written"
            ),
        ) from None

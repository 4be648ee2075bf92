"""Whose folder it is, and when to stop: the lock on the output folder, and signals as a list one can read."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainer.errors import StoreLocked


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the output folder for the life of a training."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreLocked(
                "another training holds this output folder",
                place=str(folder),
                remedy="wait for it, or set another [out] path",
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT end the training after the current step; a second one ends it now."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Whose folder it is, and when to stop: the lock, signals as a list one can read, a limit on foreign code."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from trainer.errors import StoreError, StoreLocked


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Hold the output folder for the life of a training.

    Raises:
        StoreLocked: another training does. StoreError: the folder can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(
            f"the output folder can't be written: {error.strerror}",
            place=str(folder),
            remedy="set another [out] path",
        ) from None
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
def stop_signals() -> Iterator[list[int]]:
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


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End what runs inside after `seconds`, with a TimeoutError. Only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

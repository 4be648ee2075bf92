"""Control this process: lock the output folder, collect signals to stop, limit the time of a block."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from harvester.system import disk_refusal
from harvester.system.background import StopRequests
from harvester.system.files import try_lock
from harvester.system.process_state import holder_remedy
from trainer.errors import Interrupted, StoreError, StoreLocked

# Seconds within which signals to one of several processes are one: a scheduler sends them to the whole job,
# and the launcher forwards its own.
ECHO_S = 2.0

# Most bytes that are read of a LOCK file.
_MAX_NOTE_BYTES = 4096


def is_leader() -> bool:
    """Whether this process speaks for its training: it has no launcher, or it is the one of rank 0."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def lock_output_folder(folder: Path, what: str = "training", setting: str = "[out] path") -> Iterator[None]:
    """Hold an exclusive `flock` on `folder/LOCK` during the block; the folder is made if it is absent.

    The kernel drops the lock when the process ends, however it ends.

    Args:
        what: what this process does, for the message of another one.
        setting: that names the folder.

    Raises:
        StoreLocked: another process holds the lock; names it.
        StoreFull, StoreError: the folder can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        why = "the output folder can't be written"
        raise disk_refusal.refused(error, why, folder, f"set another {setting}") from None
    try:
        try:
            is_locked = try_lock(handle)
        except OSError as error:
            raise StoreError(
                f"the output folder can't be locked: {error.strerror}",
                place=str(folder),
                remedy=f"set another {setting}, on a disk of this machine",
            ) from None
        if not is_locked:
            holder = _read_holder(handle)
            who = f" (pid {holder['pid']} on {holder['host']})" if holder else ""
            raise StoreLocked(
                f"another {holder.get('what', 'training')}{who} holds this output folder",
                place=str(folder),
                remedy=holder_remedy(holder, f"wait until it ends, or set another {setting}"),
            )
        note = {"pid": os.getpid(), "host": os.uname().nodename, "what": what}
        with suppress(OSError):  # only for messages
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(note).encode(), 0)
        yield
    finally:
        os.close(handle)


def _read_holder(handle: int) -> dict[str, Any]:
    """Return what the process that holds a lock wrote into its file; empty for another version's."""
    try:
        note = json.loads(os.pread(handle, _MAX_NOTE_BYTES, 0))
        return {"pid": int(note["pid"]), "host": str(note["host"]), "what": str(note["what"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def end_on_sigterm() -> None:
    """Let SIGTERM end this process with exit code 143, also where it is process 1 of a container.

    The kernel drops a signal to process 1 that no handler is set for. `end_before_first_step` and
    `stop_signals` replace this handler while a training is prepared and while steps are made.
    """

    def on_signal(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_signal)


def ignore_sigterm() -> None:
    """Ignore SIGTERM from now on: this process ends by itself, and its exit code shall stay the same."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def handling(on_signal: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT by a function during the block; afterwards as before it."""
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Stopped(BaseException):
    """A signal came. No `except Exception` may take it for an error of what it interrupted."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def end_before_first_step(requests: StopRequests | None = None) -> Iterator[None]:
    """End the training at once if SIGTERM or SIGINT comes during the block; nothing is to be saved yet.

    Args:
        requests: heed these after the block instead, and leave signals alone.

    Raises:
        Interrupted: a signal or a request came.
    """
    if requests is not None:
        yield
        if requests.count:
            raise _stopped_early(signal.SIGINT)
        return

    def on_signal(number: int, _frame: FrameType | None) -> None:
        raise _Stopped(number)

    try:
        with handling(on_signal):
            yield
    except _Stopped as stopped:
        raise _stopped_early(stopped.number) from None


def _stopped_early(number: int) -> Interrupted:
    return Interrupted(
        "stopped before the first step",
        signal_number=number,
        remedy="the same command goes on from the last checkpoint, if there is one",
    )


@contextmanager
def stop_signals(requests: StopRequests | None = None) -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT during the block, so that a training can finish its step first.

    Args:
        requests: take these for SIGINT instead, and leave signals alone.

    Yields:
        Numbers of the signals received so far: empty, or one. A second signal raises KeyboardInterrupt.
    """
    received: list[int] = []
    if requests is not None:
        with requests.heard_by(lambda: received.append(signal.SIGINT)):
            yield received
        return

    last_at = -math.inf

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal last_at
        now = time.monotonic()
        is_echo, last_at = now - last_at < ECHO_S and _has_launcher(), now
        if received and not is_echo:
            raise KeyboardInterrupt
        if not received:
            received.append(number)

    with handling(on_signal):
        yield received


def _has_launcher() -> bool:
    """Whether a launcher started this process beside others, which ends it after a second signal."""
    return int(os.environ.get("WORLD_SIZE") or "1") > 1


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after `seconds`. Outside the main thread there is no limit.

    Raises:
        TimeoutError: the block took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

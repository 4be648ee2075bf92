"""Turn signals into endings: the first SIGINT or SIGTERM drains, a second one aborts, SIGHUP is ignored."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from harvester.system.background import StopRequests

ENDING = (signal.SIGTERM, signal.SIGINT)


@dataclass(slots=True)
class Signals:
    """The signals that came: the number of the first (0 for none) and the count of all."""

    number: int = 0
    count: int = 0
    _task: asyncio.Task[object] | None = None

    def cancel_at_second(self, task: asyncio.Task[object] | None) -> None:
        """Cancel this task, from now on, when a second or later signal comes."""
        self._task = task

    def note(self, number: int) -> bool:
        """Count a signal; return whether it is the first."""
        self.count += 1
        if self.count == 1:
            self.number = number
            return True
        if self._task is not None:
            self._task.cancel()
        return False


@contextmanager
def handled(on_first: Callable[[], object], requests: StopRequests | None = None) -> Iterator[Signals]:
    """Install handlers on the running loop until the block ends; `on_first` is called at the first signal.

    SIGHUP is ignored: a closed terminal is no reason to lose a harvest. On a loop of another thread than the
    main one nothing is installed, because Python delivers signals to the main thread alone.

    Args:
        requests: take these for signals, and install nothing: the program around the run handles signals.
    """
    loop = asyncio.get_running_loop()
    signals = Signals()

    def on_signal(number: int) -> None:
        if signals.note(number):
            on_first()

    if requests is not None:
        with requests.heard_by(lambda: loop.call_soon_threadsafe(on_signal, int(signal.SIGINT))):
            yield signals
        return
    if threading.current_thread() is not threading.main_thread():
        yield signals  # signals come to the main thread, whose program decides about them
        return
    for number in ENDING:
        loop.add_signal_handler(number, on_signal, number)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield signals
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGHUP, hang_up)


def end_at_once() -> None:
    """Until a harvest drains: let SIGTERM end the process with 143, also as process 1 of a container.

    The kernel does not deliver SIGTERM to a process 1 without a handler, and reading prompts takes time.
    SIGHUP is ignored from here on.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

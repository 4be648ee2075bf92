"""Signals as normal endings: the first one drains, a second one aborts, a hang-up is ignored."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

ENDING = (signal.SIGTERM, signal.SIGINT)


@dataclass(slots=True)
class Caught:
    """Which signal came first (0: none), and what a second one does."""

    number: int = 0
    second: Callable[[], object] | None = None


@contextmanager
def handled(stop: asyncio.Event) -> Iterator[Caught]:
    """Install handlers on the running loop; they only set values, and are gone afterwards.

    SIGHUP is ignored: a closed terminal is no reason to lose a harvest.
    """
    loop = asyncio.get_running_loop()
    caught = Caught()

    def on_signal(number: int) -> None:
        if caught.number == 0:
            caught.number = number
            stop.set()
        elif caught.second is not None:
            caught.second()

    for number in ENDING:
        loop.add_signal_handler(number, on_signal, number)
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield caught
    finally:
        for number in ENDING:
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGHUP, hang_up)

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
    """Which signal came first (0: none), how many came, and what the first and a second one do."""

    number: int = 0
    heard: int = 0
    first: Callable[[], object] = lambda: None
    second: Callable[[], object] = lambda: None


@contextmanager
def handled() -> Iterator[Caught]:
    """Install handlers on the running loop; they only set values, and are gone afterwards.

    SIGHUP is ignored: a closed terminal is no reason to lose a harvest.
    """
    loop = asyncio.get_running_loop()
    caught = Caught()

    def on_signal(number: int) -> None:
        caught.heard += 1
        if caught.heard == 1:
            caught.number = number
            caught.first()
        else:
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


def end_at_once() -> None:
    """Until a harvest drains: SIGTERM ends the process with 143, also as process 1 of a container.

    Without a handler the kernel keeps SIGTERM from process 1, and reading prompts may take a while. SIGHUP is
    ignored then already.
    """

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

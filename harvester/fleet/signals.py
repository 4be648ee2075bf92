"""Take SIGINT and SIGTERM for requests to end a fleet: the first drains all ranks, a second aborts them."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Iterator
from types import FrameType

from harvester.run.signals import ENDING


class Requests:
    """The requests so far.

    Attributes:
        number: of the first signal, 0 for none.
        count: of all.
    """

    def __init__(self) -> None:
        self.number = 0
        self.count = 0
        # Its `put` may interrupt any other call of it, which that of an Event may not.
        self._came: queue.SimpleQueue[None] = queue.SimpleQueue()

    @classmethod
    @contextlib.contextmanager
    def installed(cls) -> Iterator[Requests]:
        """Handle the signals during the block. SIGHUP is ignored: a closed terminal ends no harvest."""
        requests = cls()
        before = {number: signal.signal(number, requests._note) for number in ENDING}
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            yield requests
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1
        self._came.put(None)

    def wait(self, seconds: float) -> None:
        """Wait so long, or until the next signal."""
        with contextlib.suppress(queue.Empty):
            self._came.get(timeout=seconds)

"""Why a pass ends: the first reason counts, nothing new is sent after it, what is on the wire is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from harvester.errors import HarvesterError, NotSent, Parked, StoppedAtLimit
from harvester.observe.counters import COMPLETE, LIMIT_BUDGET, LIMIT_PARKED


class Closing:
    """The end of one pass, from the first reason on.

    Args:
        wall: Unix seconds now, for when to go on.
        shut: closes the teacher's doors.

    `draining` is set by the first reason. `ending` and `detail` become the PassResult's; `error` is raised
    instead.
    """

    def __init__(self, wall: Callable[[], float], shut: Callable[[], None]) -> None:
        self.ending = COMPLETE
        self.detail = ""
        self.error: HarvesterError | None = None
        self.draining = asyncio.Event()
        self._wall = wall
        self._shut = shut

    def drain(self, ending: str) -> None:
        """Send nothing new, for this reason unless there is one."""
        if not self.draining.is_set():
            self.ending = ending
            self.draining.set()
            self._shut()

    def fail(self, error: HarvesterError) -> None:
        """The pass can't go on."""
        if self.error is None:
            self.error = error
        self.drain(self.ending)

    def park(self, parked: Parked) -> None:
        """The teacher wants longer than our patience."""
        if not self.draining.is_set():
            self.detail = parked.message(self._wall())
        self.drain(LIMIT_PARKED)

    def stop_for(self, stopped: NotSent | Parked | HarvesterError) -> None:
        """What a request met that concerns all others too; NotSent is no reason of its own."""
        if isinstance(stopped, Parked):
            self.park(stopped)
        elif isinstance(stopped, StoppedAtLimit):
            self.drain(LIMIT_BUDGET)
        elif isinstance(stopped, HarvesterError):
            self.fail(stopped)

"""Keep a run to its opening hours: outside them it ends or, where it may wait, pauses.

The wall clock is read at least every half minute, so that a jump of the clock, a change of a time zone's
rules and a suspended machine are noticed.
"""

from __future__ import annotations

import asyncio

from harvester.config.schedule import OpeningHours
from harvester.errors import Ending
from harvester.run.control.settings import RunControl
from harvester.run.endings import Stop
from harvester.system.clock import Clock

LOOK_EVERY_S = 30.0

# Source of the pause, as `holds` in status.json names it.
SCHEDULE = "hours"


def apply_schedule(hours: OpeningHours, now: float, stop: Stop, control: RunControl, *, wait: bool) -> None:
    """Let the run go on, pause it, or end it, as the hours say at `now` (Unix seconds).

    Args:
        wait: pause outside the opening hours instead of ending. A deadline always ends.
    """
    why = hours.why_closed(now)
    if not why:
        control.resume(SCHEDULE)
    elif wait and not hours.is_over(now):
        control.pause(SCHEDULE, why)
    else:
        stop.ask(Ending.DEADLINE if hours.is_over(now) else Ending.HOURS, why)


async def watch(hours: OpeningHours, clock: Clock, stop: Stop, control: RunControl, *, wait: bool) -> None:
    """Apply the schedule at each opening and closing time, until cancelled."""
    never = asyncio.Event()
    while True:
        now = clock.wall()
        apply_schedule(hours, now, stop, control, wait=wait)
        await clock.wait(never, _pause_s(hours, now))


def _pause_s(hours: OpeningHours, now: float) -> float:
    """Seconds until the next opening or closing time: at most half a minute, at least 0.05."""
    edge = hours.closes_at(now) if hours.is_open(now) else hours.opens_at(now)
    return LOOK_EVERY_S if edge is None else min(LOOK_EVERY_S, max(0.05, edge - now))

"""Keeps a run to its hours, against the wall clock: outside them it ends, or holds where it may wait.

The wall clock is asked at least every half minute, so that a jump of it, a change of its zone's rules and a
machine that slept are noticed; nothing is waited for by arithmetic alone.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from harvester.config.schedule import OpeningHours
from harvester.errors import Ending
from harvester.run.control.settings import RuntimeSettings
from harvester.run.endings import Stop
from harvester.system.clock import Clock

LOOK_EVERY_S = 30.0


class Pausable(Protocol):
    """Whoever has the levers of the living pass, once there is one."""

    levers: RuntimeSettings | None


def apply_schedule(
    hours: OpeningHours, now: float, stop: Stop, levers: RuntimeSettings, *, wait: bool
) -> None:
    """Open: let go. Closed: hold until it opens again if we may wait, else end. A deadline always ends."""
    why = hours.why_closed(now)
    if not why:
        levers.release(Ending.HOURS)
    elif wait and not hours.is_over(now):
        levers.hold(Ending.HOURS, why)
    else:
        stop.ask(Ending.DEADLINE if hours.is_over(now) else Ending.HOURS, why)


async def watch(hours: OpeningHours, clock: Clock, stop: Stop, held: Pausable, *, wait: bool) -> None:
    """Until cancelled: end or hold the run when its hours end, let go when they begin again."""
    never = asyncio.Event()
    while True:
        now = clock.wall()
        if held.levers is not None:
            apply_schedule(hours, now, stop, held.levers, wait=wait)
        await clock.wait(never, _pause_s(hours, now))


def _pause_s(hours: OpeningHours, now: float) -> float:
    """Until the next edge, at most half a minute, at least a moment."""
    edge = hours.closes_at(now) if hours.is_open(now) else hours.opens_at(now)
    return LOOK_EVERY_S if edge is None else min(LOOK_EVERY_S, max(0.05, edge - now))

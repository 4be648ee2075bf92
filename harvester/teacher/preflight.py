"""The first look at a teacher: is somebody there, is the key good, is our model among those it lists?

Nobody looks while the doors are held, not even for a list of models. Who isn't there yet is looked for again
as long as we are patient, as in the midst of a pass; a wrong key or a missing model ends it at once.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from harvester.api import model_list
from harvester.api.client import UNKNOWN_NAME
from harvester.api.error_body import excerpt
from harvester.errors import Parked, TeacherError, TeacherRefused
from harvester.teacher.teacher import Teacher

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Lister(Protocol):
    """What the probe needs of a client."""

    async def models(self, base: str) -> list[str]:
        """The models listed at one base URL, none where there is no list; or a TeacherError."""


class Preflight:
    """Looks until it has seen the teacher once.

    Args:
        model: the one that must be listed where there is a list.

    `is_done` once it was seen; until then `why` says what the pass waits for, "" when it needs no saying.
    """

    def __init__(self, client: Lister, teacher: Teacher, model: str) -> None:
        self.why = ""
        self._client = client
        self._teacher = teacher
        self._model = model
        self.is_done = False

    async def look(self) -> None:
        """Return when the teacher was seen, now or before, or when the pass drains.

        Raises:
            TeacherRefused: not authorised, no such host, a certificate not trusted, or the model is not
                among those listed.
            Parked: nobody was reached within our patience.
        """
        laws, draining = self._teacher.laws, self._teacher.doors[0].draining
        pause_s, lost_at = FIRST_PAUSE_S, math.inf
        while not self.is_done:
            if await self._stood_still():  # on purpose: it says nothing against the teacher
                pause_s, lost_at = FIRST_PAUSE_S, math.inf
            if draining.is_set():
                return
            try:
                self.is_done = await self._asked(draining)
            except TeacherError as error:
                if error.is_permanent:
                    raise
                now = laws.clock.now()
                lost_at = min(lost_at, now)
                self.why = (
                    f"nobody answers at {error.place}: {error.message}; is it running, and is base_url right?"
                )
                if now + pause_s - lost_at > laws.patience_s:
                    raise Parked(pause_s, self.why) from None
                await laws.clock.wait(draining, pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self.why = ""

    async def _stood_still(self) -> bool:
        """Wait until the doors are neither held nor closing; whether that took any time."""
        door, waited = self._teacher.doors[0], False  # a hold is on all doors
        while door.held_for and not door.draining.is_set():
            self.why, waited = "", True
            door.moved.clear()
            await door.clock.wait(door.moved, math.inf)
        return waited

    async def _asked(self, draining: asyncio.Event) -> bool:
        """Whether all were asked before the doors closed: a look costs nothing, so it gets no grace."""
        asking, closing = asyncio.create_task(self._ask_all()), asyncio.create_task(draining.wait())
        try:
            await asyncio.wait((asking, closing), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
            return asking.done()
        finally:
            for one in (asking, closing):
                one.cancel()
            await asyncio.gather(asking, closing, return_exceptions=True)

    async def _ask_all(self) -> None:
        """Ask each base URL; one that can be reached is enough.

        Raises:
            TeacherError: none was, and this is the reason of one of them, a transient one if there is any; or
                one that was refuses.
        """
        lost: TeacherError | None = None
        reached = 0
        for door in self._teacher.doors:
            try:
                models = await self._client.models(door.endpoint)
            except TeacherError as error:
                if error.status is not None:
                    raise
                # Nobody was ever there: a slip of the pen, not an outage.
                if error.error_code == UNKNOWN_NAME:
                    error = TeacherRefused(error.message, place=error.place, remedy="is base_url right?")
                lost = error if lost is None or lost.is_permanent else lost
                continue
            reached += 1
            if models and not model_list.names(models, self._model):
                raise TeacherRefused(
                    f"the teacher has no model {self._model!r}",
                    place=door.endpoint,
                    remedy=f"set model to one of: {excerpt(', '.join(models[:20]))}",
                )
        if lost is not None and not reached:
            raise lost

"""Check a teacher before the first request: can it be reached, is the key accepted, does it list our model?

Nothing is sent while the pass is on hold, not even a request for the list of models. A teacher that can't be
reached is tried again for up to `patience_s`; a refused key or a missing model ends the pass at once.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from harvester.api import model_list
from harvester.api.error_body import excerpt
from harvester.api.http.transport_errors import UNKNOWN_NAME
from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    Parked,
    TeacherError,
    TeacherRefused,
)
from harvester.teacher.endpoints import Endpoints

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Lister(Protocol):
    """The part of `api.http.client.Client` that lists models."""

    async def models(self, base: str) -> list[str]:
        """Return the models listed at one base URL, empty where there is no list.

        Raises:
            TeacherError: the list can't be had.
        """


class Preflight:
    """Checks a teacher once, retrying until it can be reached.

    Args:
        model: must be listed by an endpoint that has a list of models.

    Attributes:
        is_done: whether the check was passed.
        waiting_reason: what the check waits for, for the operator; "" when there is nothing to report.
    """

    def __init__(self, client: Lister, endpoints: Endpoints, model: str) -> None:
        self.is_done = False
        self.waiting_reason = ""
        self._client = client
        self._endpoints = endpoints
        self._model = model

    async def check(self) -> None:
        """Return when the check was passed, now or before, or when the pass drains.

        Raises:
            TeacherRefused: not authorised, no such host, a certificate not trusted, or the model is not
                listed.
            Parked: no endpoint could be reached within `patience_s`.
        """
        policies, draining = self._endpoints.policies, self._endpoints.draining
        pause_s, failing_since = FIRST_PAUSE_S, math.inf
        while not self.is_done:
            if await self._wait_for_holds():  # the time on hold does not count against the teacher
                pause_s, failing_since = FIRST_PAUSE_S, math.inf
            if draining.is_set():
                return
            try:
                self.is_done = await self._ask_unless_drained()
            except TeacherError as error:
                if error.is_permanent:
                    raise
                now = policies.clock.now()
                failing_since = min(failing_since, now)
                self.waiting_reason = _why_unreached(error)
                if now + pause_s - failing_since > policies.patience_s:
                    raise Parked(pause_s, self.waiting_reason) from None
                await policies.clock.wait(draining, pause_s)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
        self.waiting_reason = ""

    async def _wait_for_holds(self) -> bool:
        """Wait while the pass is on hold and does not drain; returns whether it was on hold."""
        queue, waited = self._endpoints.queues[0], False  # a hold applies to all queues
        while queue.hold_reason and not self._endpoints.draining.is_set():
            self.waiting_reason, waited = "", True
            queue.changed.clear()
            await queue.clock.wait(queue.changed, math.inf)
        return waited

    async def _ask_unless_drained(self) -> bool:
        """Ask all endpoints; False when the pass drained first: a check costs nothing, so it is cut off."""
        asking = asyncio.create_task(self._ask_all())
        draining = asyncio.create_task(self._endpoints.draining.wait())
        try:
            await asyncio.wait((asking, draining), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
            return asking.done()
        finally:
            for task in (asking, draining):
                task.cancel()
            await asyncio.gather(asking, draining, return_exceptions=True)

    async def _ask_all(self) -> None:
        """Ask each base URL; one that can be reached is enough.

        Raises:
            TeacherError: none could be reached (the error of one of them, a transient one if there is any),
                or one that was reached refuses.
        """
        unreached: TeacherError | None = None
        reached = 0
        for queue in self._endpoints.queues:
            try:
                models = await self._client.models(queue.endpoint)
            except TeacherError as error:
                if error.status is not None:
                    raise
                # The host name does not exist: a typing error, not an outage.
                if error.error_code == UNKNOWN_NAME:
                    error = TeacherRefused(error.message, place=error.place, remedy="is base_url right?")
                unreached = error if unreached is None or unreached.is_permanent else unreached
                continue
            reached += 1
            if models and not model_list.contains(models, self._model):
                raise TeacherRefused(
                    f"the teacher has no model {self._model!r}",
                    place=queue.endpoint,
                    remedy=f"set model to one of: {excerpt(', '.join(models[:20]))}",
                )
        if unreached is not None and not reached:
            raise unreached


def _why_unreached(error: TeacherError) -> str:
    """Say whether nothing answers at the address, or something that is no API."""
    if isinstance(error, ConnectionBroken | BrokenAnswer):
        return f"{error.place} can be reached, but sends no proper reply: {error.message}; is base_url right?"
    if isinstance(error, AttemptTimeout):
        return f"{error.place} can be reached, but sends no reply: {error.message}; is base_url right?"
    return f"nobody answers at {error.place}: {error.message}; is it running, and is base_url right?"

"""Hold the endpoints of one teacher, with the limits and queues that all its callers share."""

from __future__ import annotations

import asyncio
from typing import Protocol

from harvester.api.types import RawAnswer, Request
from harvester.teacher.limits import Charge
from harvester.teacher.policies import Policies
from harvester.teacher.queue import EndpointQueue, OtherEndpoints


class Sender(Protocol):
    """The part of `api.client.Client` that sends requests."""

    async def send(self, request: Request, endpoint: str) -> RawAnswer:
        """Make one attempt at this base URL.

        Raises:
            TeacherError: anything but a 200.
        """

    async def redact(self, body: bytes) -> bytes:
        """Remove the credential from the body of one choice of an answer.

        Raises:
            BrokenAnswer: it can't be searched.
        """


class Endpoints(OtherEndpoints):
    """One queue per endpoint, and the policies they share: all requests to one teacher pay the same limits.

    Attributes:
        queues: in the order of the configuration.
        draining: set once nothing new may be sent.
        budget_changed: set whenever a reservation was settled or a ceiling changed.
    """

    def __init__(self, client: Sender, policies: Policies) -> None:
        self.client = client
        self.policies = policies
        self.draining = asyncio.Event()
        self.budget_changed = asyncio.Event()
        self._refused_rows = 0
        self.queues = [
            EndpointQueue(
                endpoint,
                limiter,
                policies.clock,
                draining=self.draining,
                patience_s=policies.patience_s,
                others=self,
            )
            for endpoint, limiter in policies.limiters.items()
        ]

    def is_another_up(self, endpoint: str) -> bool:
        """Whether an endpoint other than this one is up."""
        return any(queue.endpoint != endpoint and not queue.is_down for queue in self.queues)

    def wake_others(self, endpoint: str) -> None:
        """Let the requests that wait at others look whether this endpoint is free for them."""
        for queue in self.queues:
            if queue.endpoint != endpoint:
                queue.wake_waiting()

    def free_elsewhere(self, endpoint: str, avoid: str, charge: Charge) -> EndpointQueue | None:
        """An endpoint other than these two that would admit a request with this charge at once."""
        for queue in self.queues:
            if queue.endpoint not in {endpoint, avoid} and queue.is_free(
                queue.limiter.expected_charge(charge)
            ):
                return queue
        return None

    def choose(self, avoid: str) -> EndpointQueue:
        """The least loaded endpoint, preferably another than `avoid`: one that fails fast looks idle."""

        def rank(queue: EndpointQueue) -> tuple[int, bool, float]:
            tier, load = queue.load()
            is_avoided = queue.endpoint == avoid
            return max(tier, is_avoided), is_avoided, load

        return min(self.queues, key=rank)

    def drain(self) -> None:
        """Send nothing new: requests in flight finish, waiting ones raise NotSent."""
        self.draining.set()
        self.recheck()

    def recheck(self) -> None:
        """Make all waiting requests look again: limits, budget or pauses changed."""
        for queue in self.queues:
            queue.changed.set()
        self.budget_changed.set()

    def waiting_reason(self) -> str:
        """What delays the next request, as one line for the operator; "" when nothing does."""
        reason = next((reason for queue in self.queues if (reason := queue.waiting_reason())), "")
        if not reason and self._refused_rows:
            return f"{self._refused_rows:,} refused rows (429) that wait before their next try"
        return reason

    async def wait_after_refusal(self, wait_s: float) -> None:
        """Wait before a refused row is tried again; a drain ends the wait."""
        self._refused_rows += 1
        try:
            await self.policies.clock.wait(self.draining, wait_s)
        finally:
            self._refused_rows -= 1

"""Hold the endpoints of one teacher, with the limits and queues that all its callers share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from harvester.api.types import RawAnswer, Request
from harvester.teacher.answer_shares import AnswerShares
from harvester.teacher.limiter.limits import Charge
from harvester.teacher.policies import Policies
from harvester.teacher.queue import Elsewhere, EndpointQueue, OtherEndpoints
from harvester.teacher.sharing.credential_parts import CredentialParts

# A request that waits at one endpoint looks whether another is free at most this often.
SOON_S = 0.005


class Sender(Protocol):
    """The part of `api.http.client.Client` that sends requests."""

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


class _Elsewhere(Elsewhere):
    """The endpoints other than the one where a request waits, without the one where it failed."""

    def __init__(
        self, others: Sequence[EndpointQueue], charge: Charge, weight: Callable[[EndpointQueue], float]
    ) -> None:
        self._others = others
        self._charge = charge
        self._weight = weight

    def free(self) -> EndpointQueue | None:
        """The one with the most free room of those that would admit the request at once."""
        charge = self._charge
        free = [queue for queue in self._others if queue.is_free(queue.limiter.expected_charge(charge))]
        return min(free, key=lambda queue: queue.load(self._weight(queue))[1], default=None)

    def soonest_s(self) -> float:
        """Seconds until one of them where nobody waits admits the request."""
        charge = self._charge
        return max(
            SOON_S, min(queue.free_in_s(queue.limiter.expected_charge(charge)) for queue in self._others)
        )


def _places(queue: EndpointQueue) -> int:
    """How many rows may be in flight at an endpoint, and one that waits there; what is in flight counts."""
    window = queue.limiter.window
    size = int(window.size) if queue.gets_rows else 0
    places = max(size, window.in_flight)
    return places + (not queue.aside_reason and places < window.ceiling)


class Endpoints(OtherEndpoints):
    """One queue per endpoint, and the policies they share: all requests to one teacher pay the same limits.

    Attributes:
        queues: in the order of the configuration.
        draining: set once nothing new may be sent.
        budget_changed: set whenever a reservation was settled or a ceiling changed.
        on_room: called whenever more or fewer requests may be in flight; see `workers`.
        shares: shares of unusable answers, where there are several endpoints.
        on_suspect: called when an endpoint's share has become suspicious.
    """

    def __init__(self, client: Sender, policies: Policies) -> None:
        self.client = client
        self.policies = policies
        self.draining = asyncio.Event()
        self.budget_changed = asyncio.Event()
        self.on_room: Callable[[], None] = lambda: None
        self.shares = AnswerShares(policies.limiters)
        self.on_suspect: Callable[[], None] = lambda: None
        self._refused_rows = 0
        self._retried_rows = 0
        self._parts = CredentialParts(policies.limiters, policies.weights, policies.clock.now())
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

    @property
    def workers(self) -> int:
        """How many rows are worth working on at once: those that may be in flight, and those that wait.

        That is the sum of the windows (or of what is in flight, where a window has shrunk below that), one
        more for each endpoint whose window may grow, which waits in line there, and the rows that wait before
        their next try and hold no place. One that is down is probed by one.
        """
        windows = sum(map(_places, self.queues))
        return windows + self._refused_rows + self._retried_rows

    def is_another_up(self, endpoint: str) -> bool:
        """Whether an endpoint other than this one is up, and not put aside."""
        return any(queue.endpoint != endpoint and queue.gets_rows for queue in self.queues)

    def may_put_aside(self, endpoint: str) -> bool:
        """Whether another endpoint is left that is not put aside."""
        return any(queue.endpoint != endpoint and not queue.aside_reason for queue in self.queues)

    def queue_of(self, endpoint: str) -> EndpointQueue:
        """Return the queue of this base URL."""
        return next(queue for queue in self.queues if queue.endpoint == endpoint)

    def wake_others(self, endpoint: str) -> None:
        """Let the requests that wait at others look whether this endpoint is free for them."""
        self.on_room()
        for queue in self.queues:
            if queue.endpoint != endpoint:
                queue.wake_waiting()

    def departed(self) -> None:
        """Note that a request was sent: the window of its endpoint may have grown."""
        self.on_room()

    def elsewhere(self, endpoint: str, avoid: str, charge: Charge) -> Elsewhere | None:
        """Return where else than at these two a request could go; None for a teacher with one endpoint."""
        others = [queue for queue in self.queues if queue.endpoint not in {endpoint, avoid}]
        return _Elsewhere(others, charge, self.weight) if others else None

    def weight(self, queue: EndpointQueue) -> float:
        """Return what a free place of this endpoint counts."""
        return self.policies.weights.get(queue.endpoint, 1.0)

    def choose(self, avoid: str, charge: Charge) -> EndpointQueue:
        """Return the endpoint with the most free room, preferably one that admits this charge at once.

        Another than `avoid` is preferred to it: one that fails fast looks idle.
        """
        self._divide_limits()

        def rank(queue: EndpointQueue) -> tuple[int, bool, bool, float]:
            tier, load = queue.load(self.weight(queue))
            is_avoided = queue.endpoint == avoid
            waits = tier == 1 and not queue.is_free(queue.limiter.expected_charge(charge))
            return max(tier, is_avoided), is_avoided, waits, load

        return self.queues[0] if len(self.queues) == 1 else min(self.queues, key=rank)

    def note_answer(self, endpoint: str, request: Request, *, is_bad: bool) -> None:
        """Count an answer, usable or not, for the comparison of the endpoints."""
        if len(self.queues) > 1 and self.shares.note(endpoint, request, is_bad=is_bad):
            self.on_suspect()

    def gauges(self) -> list[dict[str, Any]]:
        """Return state and pace of each endpoint, as JSON values; empty where there is but one."""
        if len(self.queues) < 2:
            return []
        now = self.policies.clock.now()
        gauges = []
        for queue in self.queues:
            limiter, pace = queue.limiter, queue.pace
            state, why = queue.state
            share = self.shares.share(queue.endpoint)
            gauges.append(
                {
                    "endpoint": queue.endpoint,
                    "state": state,
                    "why": why,
                    "window": int(limiter.window.size) if queue.gets_rows else 0,
                    "in_flight": limiter.window.in_flight,
                    "answers": pace.count,
                    "answers_per_minute": round(pace.per_minute(now), 1),
                    "latency_s": None if pace.latency_s is None else round(pace.latency_s, 3),
                    "unusable_share": None if share is None else round(share, 4),
                    "part": round(limiter.part, 4),
                    "weight": self.weight(queue),
                }
            )
        return gauges

    def _divide_limits(self) -> None:
        absent = [queue.endpoint for queue in self.queues if not queue.gets_rows]
        if self._parts.divide(self.policies.clock.now(), absent):
            for queue in self.queues:
                queue.changed.set()

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
        """Return what delays the next request, as one line for the operator; "" when nothing does."""
        reason = next((reason for queue in self.queues if (reason := queue.waiting_reason())), "")
        if not reason and self._refused_rows:
            return f"{self._refused_rows:,} refused rows (429) that wait before their next try"
        return reason

    async def wait_before_retry(self, wait_s: float) -> None:
        """Wait before a row that failed is tried again; a drain ends the wait."""
        self._retried_rows += 1
        self.on_room()
        try:
            await self.policies.clock.wait(self.draining, wait_s)
        finally:
            self._retried_rows -= 1

    async def wait_after_refusal(self, wait_s: float) -> None:
        """Wait before a refused row is tried again; a drain ends the wait."""
        self._refused_rows += 1
        self.on_room()
        try:
            await self.policies.clock.wait(self.draining, wait_s)
        finally:
            self._refused_rows -= 1

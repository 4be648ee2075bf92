"""The onion: retry(limit(budget(count(client)))), composed in one function.

Retry is outside, so that every attempt pays the limiter and the budget again. Waiting for a limit
consumes no attempt. Around the client an intent is durable before each send, and every ending but an
answer is recorded; the answer itself is recorded by whoever asked.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from harvester.api import completion
from harvester.api.request_builder import cost_microusd
from harvester.api.types import Completion, RawAnswer, Request
from harvester.errors import (
    EndpointDown,
    GaveUp,
    NotSent,
    RateLimited,
    StoppedAtLimit,
    TeacherError,
    TeacherRefused,
)
from harvester.observe.counters import Tally
from harvester.store.journal.records import Failure, Intent, Refund
from harvester.store.journal.writer import AsyncWriter
from harvester.teacher.budget import Room
from harvester.teacher.policies import Policies
from harvester.teacher.queue import EndpointQueue
from harvester.teacher.rate_limiter import Charge


class Sender(Protocol):
    """What the onion needs of a client."""

    async def send(self, request: Request, endpoint: str) -> RawAnswer:
        """One attempt: a 200, or a TeacherError."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on the wire; `number` counts from 1, `avoid` is where the last one failed."""

    request: Request
    charge: Charge
    number: int
    endpoint: str = ""
    avoid: str = ""


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion and the attempt that brought it."""

    raw: RawAnswer
    completion: Completion
    attempt_id: int
    attempts: int
    cost_microusd: int


Ask = Callable[[Attempt], Awaitable[Answered]]


class Teacher:
    """Asks one teacher, at whichever of its endpoints is least loaded, under its laws.

    Args:
        client: sends one attempt.
        laws: limiters, budget, backoff and clock.
        scribe: keeps intents and failures.
        tally: counts attempts, errors, waits.
        run_id: goes into each intent.
    """

    def __init__(
        self, client: Sender, laws: Policies, scribe: AsyncWriter, tally: Tally, run_id: str
    ) -> None:
        self._client = client
        self._laws = laws
        self._scribe = scribe
        self._tally = tally
        self._run_id = run_id
        self._doors = [
            EndpointQueue(
                endpoint,
                limiter,
                laws.clock,
                patience_s=laws.patience_s,
                elsewhere=lambda: any(not door.is_out for door in self._doors),
            )
            for endpoint, limiter in laws.limiters.items()
        ]
        self._settled = asyncio.Event()
        self._onion = self._compose()

    def _compose(self) -> Ask:
        """The order, said aloud: an attempt goes from the left to the right."""
        return self._retrying(self._limited(self._budgeted(self._counted)))

    async def ask(self, request: Request) -> Answered:
        """One answer, whatever it takes within the laws.

        Raises:
            GaveUp: this prompt will get no answer: rejected, or its attempts are used up.
            TeacherRefused: no prompt will.
            StoppedAtLimit: the budget does not allow it.
            NotSent: the pass began to drain before it left.
            Parked: the teacher asks for more patience than we have.
            StoreError: an intent could not be written.
        """
        self._laws.backoff.allowance.first_try()
        return await self._onion(Attempt(request, Charge(request.input_tokens, request.output_tokens), 1))

    def beside(self, scribe: AsyncWriter, tally: Tally, run_id: str) -> Teacher:
        """The same doors and laws, other books: what it asks pays the same limits."""
        aside = copy.copy(self)
        aside._scribe, aside._tally, aside._run_id, aside._onion = scribe, tally, run_id, aside._compose()
        return aside

    def drain(self) -> None:
        """Admit nobody any more; who is on the wire finishes, who waits gets NotSent."""
        for door in self._doors:
            door.drain()
        self._settled.set()

    @property
    def doors(self) -> list[EndpointQueue]:
        """The doors of the endpoints: their windows, and levers to move."""
        return self._doors

    @property
    def laws(self) -> Policies:
        """The laws that govern this pass."""
        return self._laws

    def look_again(self) -> None:
        """The laws changed: whoever waits asks them anew."""
        for door in self._doors:
            door.moved.set()
        self._settled.set()

    def why(self) -> str:
        """What holds the next request back, "" when nothing does."""
        return next((why for door in self._doors if (why := door.why())), "")

    def _retrying(self, inner: Ask) -> Ask:
        async def ask(attempt: Attempt) -> Answered:
            unreached = 0
            while True:
                try:
                    return await inner(attempt)
                except RateLimited:
                    continue  # the limiter is paused by now; no attempt is consumed
                except TeacherError as error:
                    # What never left costs no attempt; the breaker and our patience bound it.
                    left = error.is_permanent or error.status is not None or error.maybe_billed
                    unreached += not left
                    wait_s = self._wait_s(error, attempt.number if left else self._free(unreached))
                    # `enter` sees a drain
                    await self._laws.clock.wait(self._doors[0].draining, wait_s)
                    attempt = replace(attempt, number=attempt.number + left, avoid=error.endpoint)

        return ask

    def _free(self, tries: int) -> int:
        """As how many attempts so many tries count that never left: they lengthen the wait a little."""
        return min(tries, 2, self._laws.backoff.max_attempts - 1)

    def _wait_s(self, error: TeacherError, attempts: int) -> float:
        """Seconds until the next try; raises when there is none."""
        laws = self._laws
        wait_s = laws.backoff.wait_s(error, attempts)
        if wait_s is not None:
            self._tally.retries += 1
            return max(wait_s, laws.backoff.allowance.retry(laws.clock.now()))
        if isinstance(error, TeacherRefused):
            raise error
        raise GaveUp(error, attempts) from error

    def _limited(self, inner: Ask) -> Ask:
        async def ask(attempt: Attempt) -> Answered:
            request = attempt.request
            asked = Charge(request.input_tokens, request.output_tokens)
            while True:
                door = self._choose(attempt.avoid)
                charge = door.limiter.likely(asked)
                try:
                    entered_at = await door.enter(charge)
                    break
                except EndpointDown:
                    continue
            attempt = replace(attempt, charge=charge, endpoint=door.endpoint)
            try:
                answered = await inner(attempt)
            except TeacherError as error:
                error.endpoint = door.endpoint
                self._tally.rate_limited += isinstance(error, RateLimited)
                door.failed(error, request.key, attempt.charge, entered_at)
                raise
            except (NotSent, StoppedAtLimit):
                door.not_sent(attempt.charge)
                raise
            else:
                usage = answered.completion.usage
                actual = Charge(usage.input_tokens, usage.output_tokens)
                door.answered(attempt.charge, actual, entered_at, answered.raw.headers)
                return answered
            finally:
                door.leave()

        return ask

    def _choose(self, avoid: str) -> EndpointQueue:
        """The least loaded endpoint, another one than `avoid` if there is one: who fails fast looks idle."""

        def rank(door: EndpointQueue) -> tuple[int, bool, float]:
            tier, load = door.load()
            is_avoided = door.endpoint == avoid
            return max(tier, is_avoided), is_avoided, load

        return min(self._doors, key=rank)

    def _budgeted(self, inner: Ask) -> Ask:
        budget = self._laws.budget

        async def ask(attempt: Attempt) -> Answered:
            try:
                return await within(attempt)
            finally:
                self._settled.set()  # whoever waits for room looks again

        async def within(attempt: Attempt) -> Answered:
            request = attempt.request
            reserved = (request.most_tokens, request.most_microusd)
            while (room := budget.reserve(*reserved)) is not Room.GRANTED:
                if room is Room.NEVER:
                    raise StoppedAtLimit("the budget is used up", remedy="raise [budget], then resume")
                self._settled.clear()
                await self._settled.wait()
                if self._doors[0].draining.is_set():
                    raise NotSent
            try:
                answered = await inner(attempt)
            except TeacherError as error:  # what may have been billed counts as billed: the safe side
                budget.settle(reserved, reserved if error.maybe_billed else (0, 0))
                raise
            except BaseException:
                budget.settle(reserved, reserved)
                raise
            usage = answered.completion.usage
            billed = (usage.input_tokens + usage.output_tokens, answered.cost_microusd)
            # Without a count from the teacher the reservation stands: a ceiling errs on the safe side.
            budget.settle(reserved, billed if usage.source == "reported" else reserved)
            return answered

        return ask

    async def _counted(self, attempt: Attempt) -> Answered:
        """Intent, send, parse; a failure or refund is recorded before anyone hears of it."""
        request, clock, tally = attempt.request, self._laws.clock, self._tally
        attempt_id = self._scribe.attempt_id()
        await self._scribe.durable(
            Intent(
                attempt_id,
                request.key,
                self._run_id,
                attempt.endpoint,
                clock.wall(),
                request.most_tokens,
                request.most_microusd,
            )
        )
        tally.requests_sent += 1
        try:
            raw = await self._client.send(request, attempt.endpoint)
            parsed = completion.parse(raw.body, request.input_tokens, request.body.get("response_format"))
        except TeacherError as error:
            self._record(error, attempt_id, request.key)
            raise
        except (asyncio.CancelledError, MemoryError):
            tally.possibly_billed += 1  # the intent stays without an outcome
            raise
        cost = cost_microusd(
            self._laws.price,
            parsed.usage.input_tokens,
            parsed.usage.output_tokens,
            parsed.usage.cached_tokens,
        )
        return Answered(raw, parsed, attempt_id, attempt.number, cost)

    def _record(self, error: TeacherError, attempt_id: int, key: bytes) -> None:
        tally = self._tally
        tally.note(tally.errors, error.code)
        tally.possibly_billed += error.maybe_billed
        if error.status is None and not error.maybe_billed:
            tally.refunded += 1
            self._scribe.submit(Refund(attempt_id), lambda: None)
            return
        at = self._laws.clock.wall()
        failure = Failure(attempt_id, key, error.code, error.status, error.raw, error.maybe_billed, at)
        self._scribe.submit(failure, lambda: None)

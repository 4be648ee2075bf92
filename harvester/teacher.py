"""The onion: retry(limit(budget(count(client)))), composed in one function.

Retry is outside, so that every attempt pays the limiter and the budget again. Waiting for a limit
consumes no attempt. Around the client an intent is durable before each send, and every ending but an
answer is recorded; the answer itself is recorded by whoever asked.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from harvester import completion
from harvester.admission import Admission, NotSent
from harvester.backoff import Backoff
from harvester.budget import Budget, Room
from harvester.clock import Clock
from harvester.config import Price
from harvester.errors import RateLimited, StoppedAtLimit, TeacherError, TeacherRefused
from harvester.journey import Completion, RawAnswer, Request
from harvester.limiter import Charge, Limiter, Window
from harvester.metrics import Tally
from harvester.plan import cost_microusd
from harvester.records import Failure, Intent, Refund
from harvester.scribe import Scribe


class Sender(Protocol):
    """What the onion needs of a client."""

    async def send(self, request: Request, endpoint: str) -> RawAnswer:
        """One attempt: a 200, or a TeacherError."""


class GaveUp(Exception):
    """A dead letter: the last error and how many attempts there were."""

    def __init__(self, error: TeacherError, attempts: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.attempts = attempts


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try on the wire; `number` counts from 1."""

    request: Request
    charge: Charge
    number: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A completion and the attempt that brought it."""

    raw: RawAnswer
    completion: Completion
    attempt_id: int
    attempts: int
    cost_microusd: int


Ask = Callable[[Attempt], Awaitable[Answered]]


@dataclass(slots=True)
class Laws:
    """The values that govern one endpoint in one pass."""

    limiter: Limiter
    budget: Budget
    backoff: Backoff
    clock: Clock
    price: Price | None = None


class Teacher:
    """Asks one endpoint under its laws.

    Args:
        client: sends one attempt.
        endpoint: base URL.
        laws: limiter, budget, backoff and clock.
        scribe: keeps intents and failures.
        tally: counts attempts, errors, waits.
        run_id: goes into each intent.
    """

    def __init__(
        self, client: Sender, endpoint: str, laws: Laws, scribe: Scribe, tally: Tally, run_id: str
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._laws = laws
        self._scribe = scribe
        self._tally = tally
        self._run_id = run_id
        self._door = Admission(laws.limiter, laws.clock)
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
            StoreError: an intent could not be written.
        """
        return await self._onion(Attempt(request, Charge(request.input_tokens, request.output_tokens), 1))

    def drain(self) -> None:
        """Admit nobody any more; who is on the wire finishes, who waits gets NotSent."""
        self._door.drain()

    @property
    def window(self) -> Window:
        """The window of requests in flight."""
        return self._laws.limiter.window

    def why(self) -> str:
        """What holds the next request back, "" when nothing does."""
        return self._door.why()

    def _retrying(self, inner: Ask) -> Ask:
        async def ask(attempt: Attempt) -> Answered:
            while True:
                try:
                    return await inner(attempt)
                except RateLimited:
                    continue  # the limiter is paused by now; no attempt is consumed
                except TeacherError as error:
                    wait_s = self._laws.backoff.wait_s(error, attempt.number)
                    if wait_s is None and isinstance(error, TeacherRefused):
                        raise
                    if wait_s is None:
                        raise GaveUp(error, attempt.number) from error
                    self._tally.retries += 1
                    await self._laws.clock.wait(self._door.draining, wait_s)  # `enter` sees a drain
                    attempt = replace(attempt, number=attempt.number + 1)

        return ask

    def _limited(self, inner: Ask) -> Ask:
        door = self._door

        async def ask(attempt: Attempt) -> Answered:
            attempt = replace(attempt, charge=self._laws.limiter.likely(attempt.charge))
            entered_at = await door.enter(attempt.charge)
            try:
                answered = await inner(attempt)
            except TeacherError as error:
                self._tally.rate_limited += isinstance(error, RateLimited)
                door.failed(error, attempt.charge, entered_at)
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

    def _budgeted(self, inner: Ask) -> Ask:
        budget = self._laws.budget

        async def ask(attempt: Attempt) -> Answered:
            request = attempt.request
            reserved = (request.input_tokens + request.output_tokens, request.reserved_microusd)
            while (room := budget.reserve(*reserved)) is not Room.GRANTED:
                if room is Room.NEVER:
                    raise StoppedAtLimit("the budget is used up", remedy="raise [budget], then resume")
                await self._laws.clock.wait(self._door.moved, math.inf)
                self._door.moved.clear()
                if self._door.draining.is_set():
                    raise NotSent
            try:
                answered = await inner(attempt)
            except TeacherError as error:
                # What may have been billed counts as billed: a ceiling errs on the safe side.
                budget.settle(reserved, reserved if error.maybe_billed else (0, 0))
                raise
            except BaseException:
                budget.settle(reserved, reserved)
                raise
            usage = answered.completion.usage
            budget.settle(reserved, (usage.input_tokens + usage.output_tokens, answered.cost_microusd))
            return answered

        return ask

    async def _counted(self, attempt: Attempt) -> Answered:
        """Intent, send, parse; a failure or refund is recorded before anyone hears of it."""
        request, clock, tally = attempt.request, self._laws.clock, self._tally
        attempt_id = self._scribe.attempt_id()
        tokens = request.input_tokens + request.output_tokens
        await self._scribe.durable(
            Intent(
                attempt_id, request.key, self._run_id, self._endpoint, clock.wall(), tokens,
                request.reserved_microusd,
            )
        )  # fmt: skip
        tally.requests_sent += 1
        try:
            raw = await self._client.send(request, self._endpoint)
            parsed = completion.parse(raw.body, input_tokens=request.input_tokens)
        except TeacherError as error:
            self._record(error, attempt_id, request.key)
            raise
        except asyncio.CancelledError:
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
            self._scribe.submit(Refund(attempt_id), _nothing)
            return
        at = self._laws.clock.wall()
        failure = Failure(attempt_id, key, error.code, error.status, error.raw, error.maybe_billed, at)
        self._scribe.submit(failure, _nothing)


def _nothing() -> None:
    pass

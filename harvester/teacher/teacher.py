"""Ask a teacher one question: retry(limit(budget(record(send)))), composed in one place.

Retry is outermost, so that every attempt pays the limiter and the budget again. An intent is durable in the
journal before each send, and every end of an attempt other than an answer is recorded here; the answer itself
is recorded by the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial

from harvester.api import parse_in_child
from harvester.api.replies.choices import ChoiceAnswer, Choices
from harvester.api.replies.completion import flag_unasked_tool_call
from harvester.api.request_builder import cost_microusd
from harvester.api.scoring.request_forms import way_of
from harvester.api.types import (
    CHAT_PATH,
    UNUSABLE,
    USAGE_CORRECTED,
    USAGE_ESTIMATED,
    Completion,
    RawAnswer,
    Request,
)
from harvester.errors import (
    BrokenAnswer,
    EndpointDown,
    NotSent,
    RateLimited,
    RequestFailed,
    StoppedAtLimit,
    TeacherError,
    TeacherRefused,
)
from harvester.observe.counters import Counters
from harvester.store.journal.records import Failure, Intent, Refund
from harvester.store.journal.writer import AsyncWriter
from harvester.system import open_files
from harvester.teacher.budget import NOTHING, Amounts, Reservation, why_exhausted
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.limiter.limits import Charge
from harvester.teacher.limiter.sends import Entry
from harvester.teacher.queue import EndpointQueue, FreeElsewhere, Withdrawn


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to get an answer.

    Attributes:
        charge: tokens reserved at the limiter.
        number: counts from 1; a failed connection uses up no number.
        endpoint: base URL it is sent to, "" before one is chosen.
        avoid: base URL where the previous try failed, or "".
        only: base URL that it is to be sent to, whatever is thought of it; "" for any.
        depart: waits until it may be sent; None before an endpoint is chosen.
        most: tokens and micro-dollars that it may be billed, as the budget reserved them.
    """

    request: Request
    charge: Charge
    number: int
    endpoint: str = ""
    avoid: str = ""
    only: str = ""
    depart: Callable[[], Awaitable[None]] | None = None
    most: Amounts = NOTHING


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """A completion, and the attempt that brought it.

    Attributes:
        completion: of a request for several answers the first one's, with the usage of the whole request.
        charged: tokens and micro-dollars that the budget was charged for it.
        choices: the answers to a request for several; None for any other request.
    """

    raw: RawAnswer
    completion: Completion
    attempt_id: int
    attempts: int
    cost_microusd: int
    charged: Amounts | None = None
    choices: Choices | None = None


# One layer around an attempt, or the send itself.
Layer = Callable[[Attempt], Awaitable[AttemptResult]]


class _RefusedForNow(Exception):
    """The row was refused by a limit; it is asked again after a wait."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


class Teacher:
    """Asks one teacher, at whichever endpoint is least loaded, within the policies of a pass.

    Several may share the same endpoints, each with its own records: the run and its canary do.

    Args:
        endpoints: queues, policies and client; shared.
        writer: records intents and failures.
        tally: counts attempts, errors and retries.
        run_id: stored with each intent.
        sent: is set when a request is sent.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        writer: AsyncWriter,
        tally: Counters,
        run_id: str,
        sent: asyncio.Event | None = None,
    ) -> None:
        self.endpoints = endpoints
        self._policies = endpoints.policies
        self._writer = writer
        self._tally = tally
        self._run_id = run_id
        self._sent = sent or asyncio.Event()
        self._attempt_once = self._limited(self._budgeted(self._recorded))

    async def ask(self, request: Request) -> AttemptResult:
        """Get one answer, with as many attempts and as much waiting as the policies allow.

        Raises:
            RequestFailed: this prompt gets no answer: rejected, or its attempts are used up.
            TeacherRefused: no prompt will get one.
            StoppedAtLimit: the budget does not allow it.
            NotSent: the pass began to drain before it was sent.
            Parked: the teacher asks for a wait beyond `patience_s`.
            StoreError: an intent could not be written.
        """
        retry = self._policies.retry
        charge = Charge(request.input_tokens, request.output_tokens, len(request.each))
        attempt = Attempt(request, charge, 1)
        is_ours = False

        async def send(number: int) -> AttemptResult:
            nonlocal attempt, is_ours
            attempt = replace(attempt, number=number)
            while True:
                try:
                    return await self._attempt_once(attempt)
                except _RefusedForNow as refused:  # no attempt is used up
                    await self.endpoints.wait_after_refusal(refused.wait_s)
                except Withdrawn:  # nothing was sent
                    continue
                except TeacherError as error:
                    attempt = replace(attempt, avoid=error.endpoint)
                    is_ours = error.error_code == open_files.CODE
                    raise

        async def wait(seconds: float) -> None:
            await self._wait_before_retry(seconds, is_ours=is_ours)

        retry.budget.first_attempt()
        try:
            return await retry.run(send, wait)
        except TeacherRefused:
            raise
        except TeacherError as error:
            raise RequestFailed(error, attempt.number) from error

    async def ask_at(self, request: Request, endpoint: str) -> AttemptResult:
        """Get one answer from this base URL, also if it is put aside, in one attempt.

        Raises:
            TeacherError: there is none. Otherwise as `ask`.
        """
        charge = Charge(request.input_tokens, request.output_tokens, len(request.each))
        attempt = Attempt(request, charge, 1, only=endpoint)
        while True:
            try:
                return await self._attempt_once(attempt)
            except _RefusedForNow as refused:
                await self.endpoints.wait_after_refusal(refused.wait_s)
            except Withdrawn:  # nothing was sent
                continue

    async def _wait_before_retry(self, seconds: float, *, is_ours: bool) -> None:
        """Wait, longer if the retry budget says so. A drain ends the wait; `enter` then raises NotSent.

        Args:
            is_ours: no file descriptor was left to connect with. The budget spares a failing teacher; nothing
                went to it here. Only a shortage that lasts, with nothing in flight, is tried no faster.
        """
        self._tally.retries += 1
        if not is_ours or not any(queue.limiter.window.in_flight for queue in self.endpoints.queues):
            seconds = max(seconds, self._policies.retry.budget.take(self._policies.clock.now()))
        await self.endpoints.wait_before_retry(seconds)

    def _limited(self, inner: Layer) -> Layer:
        async def ask(attempt: Attempt) -> AttemptResult:
            request = attempt.request
            queue, charge, entry = await self._enter(attempt)
            depart = partial(queue.depart, entry, is_probe=bool(attempt.only))
            attempt = replace(attempt, charge=charge, endpoint=queue.endpoint, depart=depart)
            try:
                answered = await inner(attempt)
            except TeacherError as error:
                error.note_endpoint(queue.endpoint)
                self._tally.rate_limited += isinstance(error, RateLimited)
                if isinstance(error, BrokenAnswer):
                    self.endpoints.note_answer(queue.endpoint, request, is_bad=True)
                verdict = queue.failed(error, request.key, charge, entry)
                if isinstance(error, RateLimited) and not verdict.is_row_at_fault:
                    raise _RefusedForNow(verdict.wait_s) from error
                raise
            except (NotSent, StoppedAtLimit, Withdrawn):
                queue.not_sent(charge)
                raise
            else:
                usage = answered.completion.usage
                choices = 1 if answered.choices is None else len(answered.choices.answers)
                actual = Charge(usage.input_tokens, usage.output_tokens, choices)
                queue.answered(request.key, charge, actual, entry, answered.raw.headers)
                self._compare(queue.endpoint, request, answered)
                return answered
            finally:
                queue.leave(entry)

        return ask

    def _compare(self, endpoint: str, request: Request, answered: AttemptResult) -> None:
        """Count the answers for the comparison of the endpoints."""
        completions: list[Completion | None] = [answered.completion]
        if answered.choices is not None:
            completions = [c if c is None else c.completion for c in answered.choices.answers]
        for row, completion in zip(request.each, completions, strict=False):
            is_bad = completion is None or completion.outcome in UNUSABLE
            self.endpoints.note_answer(endpoint, row, is_bad=is_bad)

    async def _enter(self, attempt: Attempt) -> tuple[EndpointQueue, Charge, Entry]:
        """Wait for admission at the best endpoint; returns it, what was reserved, and the admission.

        A request that waits at one endpoint goes to another that becomes free first.
        """
        endpoints = self.endpoints
        if attempt.only:
            queue = endpoints.queue_of(attempt.only)
            charge = queue.limiter.expected_charge(attempt.charge)
            return queue, charge, await queue.enter(charge, is_probe=True)
        queue = endpoints.choose(attempt.avoid, attempt.charge)
        while True:
            charge = queue.limiter.expected_charge(attempt.charge)
            elsewhere = endpoints.elsewhere(queue.endpoint, attempt.avoid, attempt.charge)
            try:
                return queue, charge, await queue.enter(charge, elsewhere)
            except FreeElsewhere as free:
                queue = free.queue
            except EndpointDown:
                queue = endpoints.choose(attempt.avoid, attempt.charge)

    def _budgeted(self, inner: Layer) -> Layer:
        budget, budget_changed = self._policies.budget, self.endpoints.budget_changed

        async def ask(attempt: Attempt) -> AttemptResult:
            reserved = (attempt.request.budget_tokens, attempt.request.budget_microusd)
            answers = len(attempt.request.each)
            await self._reserve(reserved, answers)
            billed = most = budget.most(reserved, answers)  # on the safe side, also when it is cancelled
            try:
                answered = await inner(replace(attempt, most=most))
                usage = answered.completion.usage
                if usage.source != USAGE_ESTIMATED:  # an estimate may be less than what is billed
                    billed = (usage.input_tokens + usage.output_tokens, answered.cost_microusd)
                    budget.learn(reserved, billed, answers)
                return replace(answered, charged=billed)
            except Withdrawn:
                billed = (0, 0)
                raise
            except TeacherError as error:
                if not error.maybe_billed:
                    billed = (0, 0)
                raise
            finally:
                budget.settle(reserved, billed, answers)
                budget_changed.set()

        return ask

    async def _reserve(self, amounts: Amounts, answers: int) -> None:
        """Reserve what so many answers may take, waiting for requests in flight if they may free some.

        Raises:
            StoppedAtLimit: the budget is used up. NotSent: the pass drains.
        """
        changed = self.endpoints.budget_changed
        try:
            while (answer := self._try_to_reserve(amounts, answers)) is not Reservation.GRANTED:
                if answer is Reservation.NEVER:
                    raise self._used_up(amounts, answers)
                if self.endpoints.draining.is_set():  # also set before: then nothing may wake this one
                    raise NotSent
                changed.clear()
                await changed.wait()
                if self.endpoints.draining.is_set():
                    raise NotSent
        except BaseException:
            changed.set()  # wake the others: this request no longer waits
            raise

    def _try_to_reserve(self, amounts: Amounts, answers: int) -> Reservation:
        budget = self._policies.budget
        budget.start_new_spans(self._policies.clock.wall())
        return budget.reserve(*amounts, answers)

    def _used_up(self, amounts: Amounts, answers: int) -> StoppedAtLimit:
        budget = self._policies.budget
        wanted, overshoot = budget.most(amounts, answers), budget.most(NOTHING, answers)
        ceiling = budget.exhausted(wanted)
        reason, remedy = "the budget is used up", ""
        if ceiling is not None:
            reason, remedy = why_exhausted(ceiling, wanted, overshoot)
        return StoppedAtLimit(reason, remedy=remedy)

    async def _recorded(self, attempt: Attempt) -> AttemptResult:
        """Write the intent, send, parse; a failure or a refund is recorded before the error is raised."""
        request, clock, tally = attempt.request, self._policies.clock, self._tally
        answers = len(request.each)
        attempt_id = self._writer.next_attempt_id(answers)
        await self._writer.write_durably(
            Intent(
                attempt_id,
                request.key,
                self._run_id,
                attempt.endpoint,
                clock.wall(),
                *attempt.most,
                further_keys=tuple(row.key for row in request.each[1:]),
            )
        )
        if attempt.depart is not None:
            try:
                await attempt.depart()
            except Withdrawn:
                self._writer.submit(Refund(attempt_id, answers), lambda: None)
                raise
        tally.requests_sent += 1
        self._sent.set()
        try:
            raw = await self.endpoints.client.send(request, attempt.endpoint)
            parsed, choices = await self._parsed(raw, request)
        except TeacherError as error:
            self._record_failure(error, attempt_id, request)
            raise
        except (asyncio.CancelledError, MemoryError):
            tally.possibly_billed += answers  # the intents stay without an outcome
            raise
        usage = parsed.usage
        tally.usage_corrected += usage.source == USAGE_CORRECTED
        cost = cost_microusd(
            self._policies.price, usage.input_tokens, usage.output_tokens, usage.cached_tokens
        )
        return AttemptResult(raw, parsed, attempt_id, attempt.number, cost, choices=choices)

    async def _parsed(self, raw: RawAnswer, request: Request) -> tuple[Completion, Choices | None]:
        """Parse an answer; give its memory back if it holds none.

        Raises:
            TeacherError: it holds none.
        """
        response_format = request.body.get("response_format")
        try:
            if request.path != CHAT_PATH or way_of(request.body) is not None:
                return await parse_in_child.parse_score(raw.body, request.body, request.input_tokens), None
            if request.rows:
                return await self._parsed_choices(raw, request)
            parsed = await parse_in_child.parse(raw.body, request.input_tokens, response_format)
        except BaseException:
            raw.release()
            raise
        return flag_unasked_tool_call(parsed, request.body), None

    async def _parsed_choices(self, raw: RawAnswer, request: Request) -> tuple[Completion, Choices]:
        """Parse the answer to a request for several."""
        response_format = request.body.get("response_format")
        choices = await parse_in_child.split(
            raw.body, len(request.rows), request.input_tokens, response_format
        )
        answers = []
        for answer in choices.answers:
            if answer is not None:
                body = await self.endpoints.client.redact(answer.raw)
                answer = ChoiceAnswer(body, flag_unasked_tool_call(answer.completion, request.body))
            answers.append(answer)
        first = next(answer for answer in answers if answer is not None)
        return replace(first.completion, usage=choices.usage), replace(choices, answers=tuple(answers))

    def _record_failure(self, error: TeacherError, attempt_id: int, request: Request) -> None:
        tally, answers = self._tally, len(request.each)
        tally.note(tally.errors, error.code)
        tally.possibly_billed += error.maybe_billed * answers
        if error.status is None and not error.maybe_billed:
            tally.refunded += 1
            self._writer.submit(Refund(attempt_id, answers), lambda: None)
            return
        at = self._policies.clock.wall()
        failure = Failure(
            attempt_id, request.key, error.code, error.status, error.raw, error.maybe_billed, at, answers
        )
        self._writer.submit(failure, lambda: None)

"""Run the workers of a pass: each takes a request from a bounded queue, asks it and keeps the answer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace

from harvester.api.error_body import describe
from harvester.api.joining import joined
from harvester.api.replies.choices import Choices
from harvester.api.types import Request
from harvester.config.teacher_section import PriceSection
from harvester.errors import (
    BrokenAnswer,
    Ending,
    HarvesterError,
    NotSent,
    Parked,
    PromptRejected,
    RateLimited,
    RequestFailed,
    TeacherError,
    TeacherRefused,
)
from harvester.observe.counters import Counters
from harvester.run.background.unproven import Unproven
from harvester.run.dead_letters import FailureStreak, as_rejected_prompt, is_forbidden, names_reason_of_row
from harvester.run.endings import FEWEST_ANSWERS, PassEnding, too_many_unusable
from harvester.run.in_flight import InFlight, answer_group, answer_record
from harvester.run.served_models import ServedModels
from harvester.store.journal.records import Answer, AnswerGroup, BatchRef
from harvester.store.journal.writer import AsyncWriter
from harvester.teacher.choice_limit import ChoiceLimit
from harvester.teacher.teacher import AttemptResult, Teacher

NO_MEMORY = "memory ran out while an answer was taken in: lower [teacher.limits] max_concurrency"


@dataclass(frozen=True, slots=True)
class Worker:
    """Answers requests, one at a time, and decides what a failure means. All workers of a pass share it.

    A worker doesn't wait for the disk: an answer counts as stored when the writer reports it durable.
    """

    teacher: Teacher
    writer: AsyncWriter
    in_flight: InFlight
    served_models: ServedModels
    tally: Counters
    ending: PassEnding
    choice_limit: ChoiceLimit
    price: PriceSection | None = None
    streak: FailureStreak = field(default_factory=FailureStreak)
    max_unusable: float | None = None
    unproven: Unproven | None = None

    async def serve(self, request: Request) -> None:
        """Ask one request; store its answers, or hold the failure. Raises nothing that a request can cause.

        Rows of a request for several answers that got none are asked again, before anything else.
        """
        waiting = [request]
        while waiting:
            _, again = await self._serve(waiting[0])
            waiting = again + waiting[1:]

    async def _serve(self, request: Request) -> tuple[bool, list[Request]]:
        """Ask one request; return whether it was answered, and what has to be asked in its place."""
        if self.ending.draining.is_set():
            self._release(request)
            return False, []
        await self.writer.wait_for_capacity()
        try:
            return True, await self._store(request, await self.teacher.ask(request))
        except RequestFailed as failure:
            if request.rows and _may_be_for_n(failure.error):
                return False, await self._ask_fewer(request, failure.error)
            self.hold(request, failure)
        except TeacherRefused as refused:
            if is_forbidden(refused):
                self.hold(request, RequestFailed(refused, 1))
                return False, []
            self._release(request)
            self.ending.stop_for(refused)
        except (NotSent, Parked, HarvesterError) as reason:
            self._release(request)
            self.ending.stop_for(reason)
        except MemoryError:  # the others' answers are still taken in; the next run asks for this one
            self._release(request)
            self.ending.park(Parked(0.0, NO_MEMORY))
        except (Exception, asyncio.CancelledError) as error:
            # The fault of one row ends neither the pass nor the others.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise  # the worker itself is cancelled
            unexpected = BrokenAnswer(f"the answer can't be handled: {describe(error)}", maybe_billed=True)
            self.hold(request, RequestFailed(unexpected, 1))
        return False, []

    async def _ask_fewer(self, request: Request, error: TeacherError) -> list[Request]:
        """Return what to ask after a refusal that may be for `n`: the same rows, fewer at a time.

        Where the teacher doesn't say so, the first row is asked alone: if it is answered, it was for `n`.
        """
        rows = list(request.rows)
        if not self.choice_limit.named_in(error):
            was_answered, _ = await self._serve(rows.pop(0))
            if not was_answered:
                return rows
        await self._learn(self.choice_limit.refused(len(request.rows), error))
        return list(joined(rows, self.choice_limit.size, self.price))

    async def _learn(self, is_lowered: bool) -> None:
        """Keep a lower limit on the answers of one request, so that no later run pays to learn it again."""
        if is_lowered:
            await self.choice_limit.save(self.writer.call)

    async def _store(self, request: Request, answered: AttemptResult) -> list[Request]:
        """Submit the answers to the journal; return the requests for rows that got none."""
        choices = answered.choices
        record: Answer | AnswerGroup
        if choices is None:
            record = answer_record(request, answered)
            pairs = [(request, answered.completion, record)]
        else:
            record = answer_group(request, answered, self.price)
            given = [choice for choice in choices.answers if choice is not None]
            kept = [
                row for row, choice in zip(request.rows, choices.answers, strict=False) if choice is not None
            ]
            completions = (choice.completion for choice in given)
            pairs = list(zip(kept, completions, record.answers, strict=True))
        self.streak.answered()
        self.dead_letter_held()

        def stored() -> None:
            tally = self.tally
            tally.note_request(answered.raw.latency_s)
            if choices is not None:
                tally.requests_joined += 1
                tally.answers_joined += len(pairs)
            for row, completion, answer in pairs:
                tally.answers_stored += 1
                tally.cost_microusd += answer.cost_microusd
                tally.note(tally.outcomes, answer.outcome)
                tally.note_answer(answer.input_tokens, answer.output_tokens)
                self.in_flight.complete(row, completion)
            answered.raw.release()
            if why := too_many_unusable(tally, self.max_unusable, fewest=FEWEST_ANSWERS):
                self.ending.park(Parked(0.0, why))

        self.writer.submit(record, stored)
        if self.unproven is not None:
            for row, _, answer in pairs:
                self.unproven.add(row, answer)
        self.served_models.note(answered.completion, request.prompt.id)
        return [] if choices is None else await self._rest_of(request, choices)

    def store_of_batch(
        self, request: Request, answered: AttemptResult, batch: BatchRef, on_stored: Callable[[], None]
    ) -> None:
        """Store an answer that a batch brought; `on_stored` is called when it is durable."""
        record = replace(answer_record(request, answered), batch=batch)
        self.streak.answered()
        self.dead_letter_held()

        def stored() -> None:
            tally = self.tally
            tally.cost_microusd += record.cost_microusd
            tally.note(tally.outcomes, record.outcome)
            tally.note_answer(record.input_tokens, record.output_tokens)
            if self.in_flight.is_open(request.key):
                tally.answers_stored += 1
                self.in_flight.complete(request, answered.completion)
            else:  # its row is not read yet, or belongs to other prompts
                tally.answers_early += 1
                self.in_flight.note_completed(request.key)
            on_stored()
            if why := too_many_unusable(tally, self.max_unusable, fewest=FEWEST_ANSWERS):
                self.ending.park(Parked(0.0, why))

        self.writer.submit(record, stored)
        try:
            self.served_models.note(answered.completion, request.prompt.id)
        except (Parked, HarvesterError) as reason:  # the rest of the batch is paid, and is taken in
            self.ending.stop_for(reason)

    async def _rest_of(self, request: Request, choices: Choices) -> list[Request]:
        """Return the requests for the rows without an answer: those of broken choices alone."""
        broken = [row for row, choice in zip(request.rows, choices.answers, strict=False) if choice is None]
        missing = request.rows[len(choices.answers) :]
        self.tally.choices_surplus += choices.surplus
        self.tally.choices_missing += len(missing) + len(broken)
        await self._learn(self.choice_limit.answered(len(request.rows), len(choices.answers)))
        return [*broken, *joined(missing, self.choice_limit.size, self.price)]

    def _release(self, request: Request) -> None:
        for row in request.each:
            self.in_flight.release(row)

    def hold(self, request: Request, failure: RequestFailed) -> None:
        """Dead-letter a request, or hold its failure until it is known whether others are answered."""
        for row in request.each:
            if names_reason_of_row(failure.error):
                self.in_flight.dead_letter(row, failure)
                continue
            reason = self.streak.add(row, failure)
            if reason is not None:
                self._release_held()
                self.ending.stop_for(reason)

    def dead_letter_held(self) -> None:
        """Write dead letters for the failures held so far: other requests are answered, or none are left."""
        for request, failure in self.streak.take():
            self.in_flight.dead_letter(request, as_rejected_prompt(failure))

    def close(self) -> None:
        """End the pass: dead-letter the held failures, or release them if nothing gets through any more."""
        forbidden = self.streak.forbidden()
        if forbidden is not None and not self.streak.has_answers:
            self.ending.stop_for(forbidden)
        if self.ending.error is None and self.ending.ending != Ending.PARKED:
            self.dead_letter_held()
        self._release_held()

    def _release_held(self) -> None:
        for request, _ in self.streak.take():
            self.in_flight.release(request)


def _may_be_for_n(error: TeacherError) -> bool:
    """Whether a request for several answers may have been refused, unpaid, because it asks for several."""
    is_refused = isinstance(error, PromptRejected | RateLimited) and not names_reason_of_row(error)
    return is_refused and not error.maybe_billed


class WorkerPool:
    """Tasks that take requests from one bounded queue.

    Args:
        places: places in the queue.
        wanted: returns how many workers there should be now, at least one.
        serve: what a worker does with a request; it raises only what ends the pass.
        all_taken: is set when a worker meets the end of the queue (`finish`).
    """

    def __init__(
        self,
        places: int,
        wanted: Callable[[], int],
        serve: Callable[[Request], Awaitable[None]],
        all_taken: asyncio.Event,
    ) -> None:
        self._wanted = wanted
        self._serve = serve
        self._all_taken = all_taken
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=places)
        # Requests that are served before those of the queue.
        self._first: deque[Request] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._became_idle = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start workers as tasks of this group."""
        self._group = group
        self.adjust()

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self._workers)

    def adjust(self) -> None:
        """Start the workers that are missing; surplus workers exit after their current request."""
        if self._group is None:
            return
        missing = self._wanted() - len(self._workers)
        if self._all_taken.is_set():  # others would end at once, and there would be as many after each answer
            missing = min(missing, len(self._first))
        for _ in range(missing):
            work = self._work()
            try:
                worker = self._group.create_task(work)
            except RuntimeError:  # the group ends
                work.close()
                self._group = None
                return
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    @property
    def queue_is_empty(self) -> bool:
        """No request waits for a worker."""
        return self._queue.empty() and not self._first

    async def put(self, request: Request) -> None:
        """Queue a request; waits while the queue is full."""
        await self._queue.put(request)

    def put_first(self, requests: Iterable[Request]) -> None:
        """Queue requests before all others, without a bound."""
        self._first.extend(requests)
        self._wake()

    def _wake(self) -> None:
        """Make workers that wait for a request look again."""
        if self._queue.empty():
            while self._first and not self._queue.full():
                self._queue.put_nowait(self._first.popleft())

    async def wait_until_idle(self) -> None:
        """Return when no request waits and none is worked on."""
        while self._busy or not self.queue_is_empty:
            self._became_idle.clear()
            await self._became_idle.wait()

    async def finish(self) -> None:
        """Return when the queue is drained and all workers have exited. No request may be put afterwards."""
        await self._queue.put(None)
        while self._workers:
            await asyncio.wait(list(self._workers))
        self._group = None

    async def cancel(self) -> None:
        """Cancel all workers, then discard what is put into the queue, so that a blocked `put` returns.

        Runs until cancelled itself.
        """
        self._group = None
        for worker in self._workers:
            worker.cancel()
        self._first.clear()
        while True:
            self._became_idle.set()
            await self._queue.get()

    async def _work(self) -> None:
        while True:
            request = self._first.popleft() if self._first else await self._queue.get()
            if request is None:
                if self._first:  # what was put first comes before the end
                    self._queue.put_nowait(None)
                    continue
                self._all_taken.set()
                self._queue.put_nowait(None)  # the other workers end by it too
                return
            self._busy += 1
            try:
                await self._serve(request)
            finally:
                self._busy -= 1
                if not self._busy:
                    self._became_idle.set()
            if len(self._workers) > self._wanted() and (worker := asyncio.current_task()) is not None:
                self._workers.discard(worker)  # at once: the others count
                return

"""Run the workers of a pass: each takes a request from a bounded queue, asks it and keeps the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from harvester.api.error_body import describe
from harvester.api.types import Request
from harvester.errors import (
    BrokenAnswer,
    Ending,
    HarvesterError,
    NotSent,
    Parked,
    RequestFailed,
    TeacherRefused,
)
from harvester.observe.counters import Counters
from harvester.run.dead_letters import FailureStreak, as_rejected_prompt, is_forbidden, names_reason_of_row
from harvester.run.endings import FEWEST_ANSWERS, PassEnding, too_many_unusable
from harvester.run.in_flight import InFlight, answer_record
from harvester.run.served_models import ServedModels
from harvester.store.journal.writer import AsyncWriter
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
    streak: FailureStreak = field(default_factory=FailureStreak)
    max_unusable: float | None = None

    async def serve(self, request: Request) -> None:
        """Ask one request; store the answer, or hold the failure. Raises nothing that a request can cause."""
        if self.ending.draining.is_set():
            self.in_flight.release(request)
            return
        await self.writer.wait_for_capacity()
        try:
            self._store(request, await self.teacher.ask(request))
        except RequestFailed as failure:
            self._hold(request, failure)
        except TeacherRefused as refused:
            if is_forbidden(refused):
                self._hold(request, RequestFailed(refused, 1))
                return
            self.in_flight.release(request)
            self.ending.stop_for(refused)
        except (NotSent, Parked, HarvesterError) as reason:
            self.in_flight.release(request)
            self.ending.stop_for(reason)
        except MemoryError:  # the others' answers are still taken in; the next run asks for this one
            self.in_flight.release(request)
            self.ending.park(Parked(0.0, NO_MEMORY))
        except (Exception, asyncio.CancelledError) as error:
            # The fault of one row ends neither the pass nor the others.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise  # the worker itself is cancelled
            unexpected = BrokenAnswer(f"the answer can't be handled: {describe(error)}", maybe_billed=True)
            self._hold(request, RequestFailed(unexpected, 1))

    def _store(self, request: Request, answered: AttemptResult) -> None:
        record = answer_record(request, answered)
        self.streak.answered()
        self.dead_letter_held()

        def stored() -> None:
            tally = self.tally
            tally.answers_stored += 1
            tally.cost_microusd += record.cost_microusd
            tally.note(tally.outcomes, record.outcome)
            tally.note_answer(record.latency_s, record.input_tokens, record.output_tokens)
            self.in_flight.complete(request, answered.completion)
            answered.raw.release()
            if why := too_many_unusable(tally, self.max_unusable, fewest=FEWEST_ANSWERS):
                self.ending.park(Parked(0.0, why))

        self.writer.submit(record, stored)
        self.served_models.note(answered.completion)

    def _hold(self, request: Request, failure: RequestFailed) -> None:
        if names_reason_of_row(failure.error):
            self.in_flight.dead_letter(request, failure)
            return
        reason = self.streak.add(request, failure)
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


class WorkerPool:
    """Tasks that take requests from one bounded queue.

    Args:
        size: number of workers, and of places in the queue.
        serve: what a worker does with a request; it raises only what ends the pass.
    """

    def __init__(self, size: int, serve: Callable[[Request], Awaitable[None]]) -> None:
        self._size = size
        self._serve = serve
        self._queue: asyncio.Queue[Request | None] = asyncio.Queue(maxsize=size)
        self._workers: list[asyncio.Task[None]] = []
        self._group: asyncio.TaskGroup | None = None

    def start(self, group: asyncio.TaskGroup) -> None:
        """Start all workers as tasks of this group."""
        self._group = group
        self.resize(self._size)

    def resize(self, size: int) -> None:
        """Set the number of workers; surplus workers exit after their current request."""
        self._size = size
        if self._group is None:
            return
        for number in range(size):
            if number == len(self._workers):
                self._workers.append(self._group.create_task(self._work(number)))
            elif self._workers[number].done():
                self._workers[number] = self._group.create_task(self._work(number))

    @property
    def queue_is_empty(self) -> bool:
        """No request waits for a worker."""
        return self._queue.empty()

    async def put(self, request: Request) -> None:
        """Queue a request; waits while the queue is full."""
        await self._queue.put(request)

    async def finish(self) -> None:
        """Return when the queue is drained and all workers have exited. No request may be put afterwards."""
        await self._queue.put(None)
        while busy := [worker for worker in self._workers if not worker.done()]:
            await asyncio.wait(busy)
        self._group = None

    async def cancel(self) -> None:
        """Cancel all workers, then discard what is put into the queue, so that a blocked `put` returns.

        Runs until cancelled itself.
        """
        for worker in self._workers:
            worker.cancel()
        while True:
            await self._queue.get()

    async def _work(self, number: int) -> None:
        while number < self._size:
            request = await self._queue.get()
            if request is None:
                self._queue.put_nowait(None)  # the other workers end by it too
                return
            await self._serve(request)

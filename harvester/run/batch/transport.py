"""Carry the rows of a pass in batches: fill them, watch them, and hand on what they did not answer.

A row is in at most one place: in the batch that is being filled, in a batch at the provider (as the journal
knows it), or with a worker that asks it online. It goes on only when that place can't answer it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from harvester.api.batches import batch_line, body_of
from harvester.api.request_builder import with_estimates
from harvester.api.types import Request
from harvester.config.transport import Transport
from harvester.errors import (
    BrokenAnswer,
    HarvesterError,
    Parked,
    PromptRejected,
    RequestFailed,
    ResultsDeleted,
    StoppedAtLimit,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.observe.status import span
from harvester.run.batch import submission
from harvester.run.batch.collection import TOO_MUCH_QUEUED, Collector
from harvester.run.batch.context import BatchContext
from harvester.run.batch.submission import NotCreated, Unconfirmed
from harvester.run.dead_letters import is_forbidden
from harvester.store.journal.batches import (
    BatchRow,
    BatchState,
    StoredBatch,
    change_batch,
    release_batch,
    rows_of_batch,
)
from harvester.store.journal.journal import Journal
from harvester.system.counted import counted
from harvester.system.failpoints import reach
from harvester.teacher.budget import NOTHING, SPAN_NAMES, Amounts, Reservation, why_exhausted
from harvester.teacher.retry import BROKEN_ANSWER_ATTEMPTS

AskOnline = Callable[[Request], Awaitable[None]]
# While nothing changes, the time between two looks grows by this factor.
POLL_GROWTH = 1.5
# Attempts at a row of which the provider deleted the results, though it was probably paid.
DELETED_ATTEMPTS = 2
CANCELLING = frozenset({"cancelling", "cancelled"})


class BatchTransport:
    """The batches of one pass, those of earlier runs included.

    Args:
        ask_online: hands a row to the workers.
        batches: those that had not ended when the pass began.
        keys: the keys that wait in them, each with the number of its batch.
        grace_s: how long a batch that is being sent may take after the pass began to drain.
    """

    def __init__(
        self,
        context: BatchContext,
        ask_online: AskOnline,
        batches: Sequence[StoredBatch],
        keys: Mapping[bytes, int],
        grace_s: float,
    ) -> None:
        self._context = context
        self._mode = context.config.run.transport
        self._ask_online = ask_online
        self._grace_s = grace_s
        self._held = dict(keys)
        self._open = {b.number: b for b in batches if b.state is BatchState.CREATED}
        # Batches that may have been created, and since when this pass knows of each.
        self._unconfirmed = {
            b.number: (b, context.clock.wall()) for b in batches if b.state is not BatchState.CREATED
        }
        self._collector = Collector(
            context, self._reopened, self._left, may_ask_online=self._mode is not Transport.BATCH
        )
        self._rows: list[BatchRow] = []
        self._bytes = 0
        self._most_rows = context.api.max_requests
        self._is_queue_full = False
        # The ceiling that a row waits for: batches hold what is missing. "" where none does.
        self._short_of = ""
        self._again: deque[tuple[BatchRow, TeacherError]] = deque()
        self._next_look = 0.0
        self._poll_s = context.config.batch.poll
        self._looks = 0
        self._cancels_at_end = False
        self._wake, self._changed = asyncio.Event(), asyncio.Event()
        # Set while no look at the batches is under way.
        self._idle = asyncio.Event()
        self._idle.set()
        context.ending.when_draining(self._wake.set)
        context.ending.when_draining(self._changed.set)

    @property
    def sends_batches(self) -> bool:
        """Whether rows go into batches; else only those of earlier runs are collected."""
        return self._mode is not Transport.ONLINE

    def holds(self, key: bytes) -> bool:
        """Whether a batch may still answer this key."""
        return key in self._held

    def wait_for(self, request: Request) -> None:
        """Let a row of this pass wait for the batch that holds its key."""
        self._context.in_flight.begin(request)

    def cancel_at_end(self) -> None:
        """Cancel the batches at the provider when the pass ends, instead of leaving them for the next run."""
        self._cancels_at_end = True

    def waiting_reason(self) -> str:
        """What the pass waits for; "" without batches."""
        batches = [*self._open.values(), *(batch for batch, _ in self._unconfirmed.values())]
        if not batches:
            return ""
        age_s = max(0.0, self._context.clock.wall() - min(batch.at for batch in batches))
        rows = counted(len(self._held), "row")
        short = f"; {self._short_of} takes no further row until they are billed" if self._short_of else ""
        held = f"{counted(len(batches), 'batch', 'batches')} with {rows}"
        return f"{held}; the oldest is {span(age_s)} old{short}"

    async def add(self, request: Request, attempts: int = 1, *, is_new: bool = True) -> None:
        """Put a row, which is in flight, into the batch that is being filled; send that when it is full.

        Args:
            attempts: of this row, this one included.
            is_new: it was in no batch before that was refused as a whole.
        """
        context = self._context
        request = with_estimates(replace(request, body=body_of(request)), context.price)
        size = len(batch_line(request.key, request.body, context.api.path))
        if size > context.api.max_bytes:
            await self._refuse_size(request, size)
            return
        if len(self._rows) >= self._most_rows or self._bytes + size > context.api.max_bytes:
            await self.flush()
        amounts = await self._reserve((request.budget_tokens, request.budget_microusd))
        if amounts is None:
            context.in_flight.release(request)
            return
        if attempts == 1 and is_new:
            context.retries.first_attempt()
        attempt_id = context.writer.next_attempt_id()
        self._rows.append(BatchRow(request, 0, attempt_id, attempts, amounts))
        self._bytes += size

    async def _refuse_size(self, request: Request, size: int) -> None:
        if self._mode is Transport.HYBRID:
            await self._ask_online(with_estimates(request, self._context.config.teacher.price))
            return
        most = self._context.api.max_bytes
        error = PromptRejected(
            f"a line of {size:,} bytes, and a batch takes {most:,}", place=self._context.endpoint
        )
        self._context.in_flight.dead_letter(request, RequestFailed(error, 0))

    async def _reserve(self, amounts: Amounts) -> Amounts | None:
        """Reserve the most that a row may cost; wait for batches that may give some back.

        Returns what was reserved; None where nothing was.
        """
        context, budget = self._context, self._context.budget
        while not context.ending.draining.is_set():
            self._changed.clear()
            budget.start_new_spans(context.clock.wall())
            answer = budget.reserve(*amounts)
            if answer is Reservation.GRANTED:
                return budget.commit(amounts)
            await self.flush()
            if answer is Reservation.NEVER and not self._open and not self._unconfirmed:
                wanted = budget.most(amounts)
                ceiling, reason, remedy = budget.exhausted(wanted), "", ""
                if ceiling is not None:
                    reason, remedy = why_exhausted(ceiling, wanted, budget.overshoot)
                context.ending.stop_for(StoppedAtLimit(reason, remedy=remedy))
                return None
            short = budget.exhausted(budget.most(amounts))
            self._short_of = f"the budget of {SPAN_NAMES[short.span][0]}" if short else ""
            await self._changed.wait()
            self._short_of = ""
        return None

    async def flush(self) -> None:
        """Send what was filled so far as a batch."""
        while self._must_wait_for_others and not self._context.ending.draining.is_set():
            self._changed.clear()
            await self._changed.wait()
        rows, self._rows, self._bytes = self._rows, [], 0
        if not rows:
            return
        if self._context.ending.draining.is_set():
            self._drop(rows)
            return
        batch = await submission.write_down(self._context, rows)
        self._held |= {row.request.key: batch.number for row in rows}
        await self._send(batch, rows)

    def _drop(self, rows: Sequence[BatchRow]) -> None:
        """Release rows that were not written down: the next run takes them up."""
        wall = self._context.clock.wall()
        for row in rows:
            self._context.budget.correct(row.reserved, NOTHING, sent_at=wall, wall=wall, in_run=True)
            self._context.in_flight.release(row.request)

    async def _send(self, batch: StoredBatch, rows: Sequence[BatchRow]) -> None:
        """Send a batch; one that is not confirmed stays among those that the provider's list decides."""
        sending = asyncio.create_task(submission.send(self._context, batch, rows))
        try:
            await self._until_done(sending)
            batch, ticket = await sending
        except NotCreated as failed:
            await self._release(batch, failed.error)
            return
        except (Unconfirmed, asyncio.CancelledError):
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            self._unconfirmed[batch.number] = batch, self._context.clock.wall()
            self._look_soon()
            return
        finally:
            sending.cancel()
        self._context.worker.tally.requests_sent += len(rows)
        self._open[batch.number] = batch
        self._look_soon(0.0 if ticket.is_finished else self._context.config.batch.poll)

    async def _until_done(self, sending: asyncio.Task[object]) -> None:
        """Wait for a task; once the pass drains, `grace_s` at most."""
        draining = asyncio.create_task(self._context.ending.draining.wait())
        try:
            await asyncio.wait({sending, draining}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                await asyncio.wait({sending}, timeout=self._grace_s)
            if not sending.done():
                sending.cancel()
        finally:
            draining.cancel()

    async def _release(self, batch: StoredBatch, error: TeacherError | Parked) -> None:
        """Open the rows of a batch that the provider does not have; end the pass if it refuses batches."""

        def release(journal: Journal) -> list[BatchRow]:
            with journal.reading() as connection:
                rows = rows_of_batch(connection, batch.number)
            release_batch(journal, batch, str(error))
            return rows

        rows = await self._context.writer.call(release)
        self._unconfirmed.pop(batch.number, None)
        is_refused = isinstance(error, Parked) or error.is_permanent
        reopening = error if isinstance(error, TeacherError) else TeacherUnavailable(str(error))
        for row in rows:
            self._correct(batch, row)
            self._left(row.request.key)
            if is_refused and self._mode is not Transport.HYBRID:
                self._context.in_flight.release(row.request)
            else:
                self._reopened(row, TeacherUnavailable(reopening.message, place=self._context.endpoint))
        if isinstance(error, Parked) and self._mode is not Transport.HYBRID:
            self._context.ending.park(error)
        elif is_refused and self._mode is not Transport.HYBRID:
            self._context.ending.fail(_as_refused(reopening))
        elif is_refused:
            self._context.complain(reopening)

    def _correct(self, batch: StoredBatch, row: BatchRow) -> None:
        context = self._context
        in_run = batch.run in context.runs
        wall = context.clock.wall()
        context.budget.correct(row.reserved, NOTHING, sent_at=batch.at, wall=wall, in_run=in_run)

    def _left(self, key: bytes) -> None:
        """Note that a row has left its batch."""
        if self._held.pop(key, None) is not None:
            self._changed.set()

    def _reopened(self, row: BatchRow, error: TeacherError) -> None:
        """Take a row up again if this pass asks for it; if not, the feed may bring it later."""
        if self._context.in_flight.is_open(row.request.key):
            self._again.append((row, error))
            self._changed.set()

    @property
    def _must_wait_for_others(self) -> bool:
        """Whether the account takes no further batch until one of those at the provider has ended."""
        return self._is_queue_full and bool(self._open)

    async def step(self) -> None:
        """Hand on the rows that left their batches unanswered, then send what was filled."""
        if self._must_wait_for_others:
            return
        while self._again and not self._context.ending.draining.is_set():
            await self._hand_on(*self._again.popleft())
        await self.flush()

    async def _hand_on(self, row: BatchRow, error: TeacherError) -> None:
        context, request = self._context, row.request
        failure = RequestFailed(error, row.attempts)
        if isinstance(error, PromptRejected) or is_forbidden(error):
            context.worker.hold(request, failure)
        elif not self._may_be_paid_again(row, error):
            context.in_flight.dead_letter(request, failure)
        elif self._mode is not Transport.BATCH:
            await self._ask_online(with_estimates(request, context.config.teacher.price))
        elif error.error_code == TOO_MUCH_QUEUED:  # the batch was not begun: that is no attempt
            await self.add(request, row.attempts, is_new=False)
        elif row.attempts >= context.config.run.max_attempts:
            context.in_flight.dead_letter(request, failure)
        else:
            await self.add(request, row.attempts + 1)

    def _may_be_paid_again(self, row: BatchRow, error: TeacherError) -> bool:
        """Whether a row is asked again although it may have been paid: few of those without an answer are."""
        if error.maybe_billed and not self._context.config.run.retry_possibly_billed:
            return False
        if isinstance(error, ResultsDeleted):
            return row.attempts < DELETED_ATTEMPTS
        if not isinstance(error, BrokenAnswer):
            return True
        return row.attempts < BROKEN_ANSWER_ATTEMPTS and self._context.retries.take_for_broken_answer()

    async def finish(self) -> None:
        """Return when no batch holds rows any more, or when the pass drains.

        A run that sends no batches looks at each earlier one once.
        """
        while not self._context.ending.draining.is_set():
            self._changed.clear()  # before the step: what changes meanwhile, also a drain, ends the wait
            await self.step()
            if not (self._open or self._unconfirmed or self._again or self._rows):
                return
            if not self.sends_batches and self._looks and not self._again and not self._unconfirmed:
                return
            if not self._again or self._must_wait_for_others:
                await self._changed.wait()
        self._drop(self._rows)
        self._rows = []
        with contextlib.suppress(TimeoutError):  # what is being read is taken in, as answers in flight are
            await asyncio.wait_for(self._idle.wait(), self._grace_s)
        if self._cancels_at_end:
            await self._cancel_all()

    def conclude(self) -> None:
        """Park a pass that is done but for rows that wait in batches of earlier runs."""
        if not self._context.ending.draining.is_set() and any(
            self._context.in_flight.is_open(key) for key in self._held
        ):
            reason = (
                f"{self.waiting_reason()}: they may still be answered, and are not asked twice; run again, "
                "or with `--transport hybrid`, or `harvester stop STORE --cancel-batches`"
            )
            self._context.ending.park(Parked(self._context.config.batch.poll_max, reason))

    def _look_soon(self, seconds: float | None = None) -> None:
        """Look at the batches after this time, or after that of `[batch] poll`, if not before."""
        self._poll_s = self._context.config.batch.poll
        wait_s = self._poll_s if seconds is None else seconds
        self._next_look = min(self._next_look, self._context.clock.now() + wait_s)
        self._wake.set()

    async def watch(self) -> None:
        """Look at the batches now and again, until the pass drains."""
        clock, draining = self._context.clock, self._context.ending.draining
        while not draining.is_set():
            if not (self._open or self._unconfirmed):
                self._next_look = clock.now() + self._context.config.batch.poll
                await self._wake.wait()
                self._wake.clear()
            elif (wait_s := self._next_look - clock.now()) > 0:
                await clock.wait(self._wake, wait_s)
                self._wake.clear()
            else:
                self._idle.clear()
                try:
                    await self._look_at_all()
                finally:
                    self._idle.set()

    async def _look_at_all(self) -> None:
        """Look at every batch once; the next look follows after a time that grows while nothing changes."""
        context, settings = self._context, self._context.config.batch
        wait_s, has_changed = 0.0, False
        looks: list[Callable[[], Awaitable[bool]]] = [self._confirm] if self._unconfirmed else []
        looks += [lambda batch=batch: self._look(batch) for batch in list(self._open.values())]  # type: ignore[misc]
        for look in looks:
            if context.ending.draining.is_set():
                break
            try:
                has_changed |= await look()
            except TeacherError as error:
                context.worker.tally.note(context.worker.tally.errors, error.code)
                wait_s = max(wait_s, error.retry_after_s or 0.0)
                context.complain(error)
                if error.is_permanent:
                    context.ending.fail(_as_refused(error))
            except HarvesterError as error:
                context.ending.fail(error)
        self._looks += 1
        self._poll_s = settings.poll if has_changed else min(settings.poll_max, self._poll_s * POLL_GROWTH)
        now, wall = context.clock.now(), context.clock.wall()
        latest = max([self._poll_s, wait_s])
        moments = [self._late_at(batch) - wall for batch in self._open.values() if not batch.cancel]
        moments += [since + settings.settle - wall for _, since in self._unconfirmed.values()]
        soonest = min((moment for moment in moments if moment > 0), default=latest)
        self._next_look = now + max(wait_s, min(latest, soonest))
        self._changed.set()

    def _late_at(self, batch: StoredBatch) -> float:
        """When rows of a batch are asked online instead, in Unix seconds; never but in a hybrid run."""
        settings = self._context.config.batch
        if self._mode is not Transport.HYBRID:
            return float("inf")
        finish_by = self._context.finish_by
        by_deadline = float("inf") if finish_by is None else finish_by - settings.lead
        return min(batch.at + settings.patience, by_deadline)

    async def _look(self, batch: StoredBatch) -> bool:
        """Look at one batch: collect it, or cancel it when it is late; return whether it has changed.

        Raises:
            TeacherError: the provider can't be asked now, or refuses.
        """
        context = self._context
        try:
            ticket = await context.client.poll(batch.batch_id)
        except TeacherRefused as error:
            if error.status != 404:
                raise
            await self._collector.give_up(batch, "the provider does not know it any more", error)
            self._ended(batch)
            return True
        reach("batch.after_poll")
        if ticket.is_finished:
            await self._collector.collect(batch, ticket)
            self._note_failure(batch, ticket.failure)
            self._ended(batch)
            return True
        has_changed = ticket.status != batch.status
        if has_changed:
            batch = await self._change(batch, status=ticket.status)
        if context.clock.wall() >= self._late_at(batch) or batch.cancel:
            await self._cancel(batch)
        return has_changed

    def _note_failure(self, batch: StoredBatch, failure: str) -> None:
        """Wait for other batches, or send smaller ones, when the account may not queue as much."""
        if failure != TOO_MUCH_QUEUED:
            self._is_queue_full = False
        elif len(self._open) > 1:
            self._is_queue_full = True
        elif batch.rows > 1:
            self._is_queue_full = False
            self._most_rows = batch.rows // 2
        elif batch.run in self._context.runs:  # one of an earlier run says nothing about now
            reason = f"the provider queues no batch now, not even one of a single row ({failure})"
            self._context.ending.park(Parked(self._context.config.batch.poll_max, reason))

    def _ended(self, batch: StoredBatch) -> None:
        self._open.pop(batch.number, None)
        self._changed.set()

    async def _change(self, batch: StoredBatch, **changes: object) -> StoredBatch:
        changed = await self._context.writer.call(lambda journal: change_batch(journal, batch, **changes))
        if batch.number in self._open:
            self._open[batch.number] = changed
        return changed

    async def _cancel(self, batch: StoredBatch) -> None:
        """Cancel a batch; its rows go on only when the provider shows that it has ended."""
        if not batch.cancel:
            batch = await self._change(batch, cancel=True)
        reach("batch.before_cancel")
        if batch.status in CANCELLING:
            return
        ticket = await self._context.client.cancel(batch.batch_id)
        reach("batch.after_cancel")
        await self._change(batch, status=ticket.status)
        self._look_soon(0.0 if ticket.is_finished else None)

    async def _confirm(self) -> bool:
        """Look in the provider's list for batches whose creation was not confirmed."""
        context, pending = self._context, list(self._unconfirmed.values())
        files = {batch.name: batch.file_id for batch, _ in pending}
        oldest = min(batch.at for batch, _ in pending)
        tickets = await context.client.find(files, since=oldest)
        reach("batch.after_list")
        has_changed = False
        for batch, since in pending:
            ticket = tickets.get(batch.name)
            if ticket is not None:
                created = await submission.note_created(context, batch, ticket)
                # At no moment in neither of the two: `finish` would take its rows for held by no batch.
                self._unconfirmed.pop(batch.number)
                self._open[batch.number] = created
                has_changed = True
            elif context.clock.wall() >= since + context.config.batch.settle:
                await self._release(batch, TeacherUnavailable("the batch was never created"))
                has_changed = True
        return has_changed

    async def _cancel_all(self) -> None:
        """Cancel every open batch, and collect those that have ended by then."""
        for batch in list(self._open.values()):
            try:
                async with asyncio.timeout(self._grace_s):
                    await self._cancel(batch)
                    await self._look(self._open[batch.number])
            except (TeacherError, TimeoutError) as error:
                message = f"it could not be cancelled: {error}"
                self._context.complain(HarvesterError(message, place=f"batch {batch.batch_id}"))


def _as_refused(error: TeacherError) -> TeacherError:
    """Return the error as one that ends the pass: no batch will be taken."""
    if isinstance(error, TeacherRefused):
        return error
    return TeacherRefused(
        f"the Batch API refuses: {error.message}",
        status=error.status,
        error_code=error.error_code,
        place=error.place,
        remedy="does this provider offer /files and /batches to this key, and take batches of this size "
        "([teacher.batch] max_requests, max_bytes)? `--transport online` needs neither",
    )

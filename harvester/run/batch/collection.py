"""Take in the results of a batch that has ended: answers, errors, and rows that it did not get to.

Every line is treated like a reply to a request of its own. A row leaves the batch in the transaction that
stores its answer or dead letter, or opens it again; so a kill loses nothing, and the next run reads on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harvester.api import parse_in_child
from harvester.api.batches import ProviderBatch, ResultLine, read_line
from harvester.api.replies.completion import flag_unasked_tool_call
from harvester.api.request_builder import cost_microusd, with_estimates
from harvester.api.types import USAGE_CORRECTED, USAGE_ESTIMATED, RawAnswer
from harvester.errors import (
    BrokenAnswer,
    HarvesterError,
    PromptRejected,
    RequestFailed,
    ResultsDeleted,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.run.batch.context import BatchContext
from harvester.run.dead_letters import as_rejected_prompt, is_forbidden
from harvester.store.journal.batches import (
    BatchRow,
    BatchState,
    StoredBatch,
    change_batch,
    rows_by_key,
    rows_of_batch,
)
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import BatchRowReopened, Failure
from harvester.system.failpoints import reach
from harvester.teacher.teacher import AttemptResult

# Lines whose rows are read from the journal at once.
CHUNK = 256
# Error code of a batch that would have queued more tokens than the account may.
TOO_MUCH_QUEUED = "token_limit_exceeded"
# Called with a row that may be asked again, and with the error that opened it.
Reopened = Callable[[BatchRow, TeacherError], None]


@dataclass(slots=True)
class _Course:
    """What one reading of the results has met so far."""

    batch: StoredBatch
    ticket: ProviderBatch
    seen: dict[bytes, int] = field(default_factory=dict)
    has_answers: bool = False


class Collector:
    """Reads result files.

    Args:
        on_reopened: gets each row that may be asked again, once that is durable.
        on_left: is called for each row that left its batch, with its key.
        may_ask_online: rows of a batch that the provider refuses are asked one by one.
    """

    def __init__(
        self,
        context: BatchContext,
        on_reopened: Reopened,
        on_left: Callable[[bytes], None],
        *,
        may_ask_online: bool,
    ) -> None:
        self._context = context
        self._may_ask_online = may_ask_online
        self._on_reopened = on_reopened
        self._on_left = on_left

    async def collect(self, batch: StoredBatch, ticket: ProviderBatch) -> None:
        """Take in all results of a finished batch, and end it.

        Raises:
            TeacherError: the files can't be read now. What was read is stored; call it again later.
        """
        self._end_if_failed(ticket)
        course = _Course(batch, ticket, has_answers=ticket.completed > 0)
        message = ticket.message if ticket.status == "failed" else ""
        for file_id in (ticket.output_file_id, ticket.error_file_id):
            if file_id is None:
                continue
            try:
                await self._read(course, file_id)
            except TeacherError as error:
                if error.status != 404:
                    raise
                await self.give_up(batch, "the provider has deleted its results", error)
                return
        await self._context.writer.flush()
        reach("batch.after_results")
        for row in await self._rest(batch):
            self._open_again(course, row, self._unanswered(ticket))
        await self._end(batch, ticket.status, message)

    def _end_if_failed(self, ticket: ProviderBatch) -> None:
        """End the pass when the provider fails a whole batch, and its rows may not be asked online."""
        if ticket.status == "failed" and ticket.failure != TOO_MUCH_QUEUED and not self._may_ask_online:
            self._context.ending.fail(
                TeacherRefused(
                    f"a batch failed: {ticket.failure} {ticket.message}".strip(),
                    error_code=ticket.failure,
                    place=self._context.endpoint,
                    remedy="is the model offered in batches? `--transport hybrid` asks its rows one by one",
                )
            )

    async def give_up(self, batch: StoredBatch, why: str, cause: TeacherError) -> None:
        """End a batch whose results can't be had any more: its rows may have been billed, and are open."""
        rows = await self._rest(batch)
        message = f"{why}: its {len(rows):,} rows may have been billed, and are asked again"
        name = batch.batch_id or batch.name
        self._context.complain(HarvesterError(message, place=f"batch {name}"))
        error = ResultsDeleted(message, status=cause.status, maybe_billed=True, place=batch.endpoint)
        course = _Course(batch, ProviderBatch(batch.batch_id, batch.status, None, None, 0, 0, 0))
        for row in rows:
            self._open_again(course, row, error)
        await self._end(batch, batch.status, why)

    async def _end(self, batch: StoredBatch, status: str, message: str) -> None:
        await self._context.writer.flush()
        reach("batch.before_end")
        await self._context.writer.call(
            lambda journal: change_batch(
                journal, batch, state=BatchState.ENDED, status=status, message=message
            )
        )
        reach("batch.after_end")

    async def _rest(self, batch: StoredBatch) -> list[BatchRow]:
        def read(journal: Journal) -> list[BatchRow]:
            with journal.reading() as connection:
                return rows_of_batch(connection, batch.number)

        return await self._context.writer.call(read)

    def _unanswered(self, ticket: ProviderBatch) -> TeacherError:
        """The error of a row that has no line in the result files."""
        place = self._context.endpoint
        if ticket.status == "completed":
            return BrokenAnswer(
                "the result file has no line for this row", maybe_billed=True, status=200, place=place
            )
        if ticket.status == "failed":
            why = f"the batch failed: {ticket.failure} {ticket.message}".strip()
            return TeacherUnavailable(why, error_code=ticket.failure, place=place)
        code = f"batch_{ticket.status}"
        return TeacherUnavailable(f"the batch ended before it: {ticket.status}", error_code=code, place=place)

    async def _read(self, course: _Course, file_id: str) -> None:
        lines: list[ResultLine] = []
        async for text in self._context.client.lines(file_id):
            try:
                lines.append(read_line(text))
            except BrokenAnswer as error:  # its row gets none, and counts as missing
                self._context.complain(error)
            if len(lines) == CHUNK:
                await self._take(course, lines)
                lines = []
        await self._take(course, lines)

    async def _take(self, course: _Course, lines: Sequence[ResultLine]) -> None:
        """Store what these lines hold."""
        keys = [line.key for line in lines]

        def read(journal: Journal) -> dict[bytes, BatchRow]:
            with journal.reading() as connection:
                return rows_by_key(connection, keys)

        rows = await self._context.writer.call(read)
        for line in lines:
            row = rows.get(line.key)
            if self._is_repeated(course, line) or row is None or row.batch != course.batch.number:
                continue
            await self._context.writer.wait_for_capacity()
            await self._take_line(course, row, line)
        reach("batch.after_chunk")

    def _is_repeated(self, course: _Course, line: ResultLine) -> bool:
        """Whether the files held a line for this key before; one with another answer is pointed out."""
        digest, known = zlib.crc32(line.body), course.seen.get(line.key)
        if known is None:
            course.seen[line.key] = digest
            return False
        if known != digest:
            self._context.complain(
                HarvesterError(
                    f"two lines with other answers for {line.key.hex()}: the first one is kept",
                    place=f"batch {course.batch.batch_id}",
                )
            )
        return True

    async def _take_line(self, course: _Course, row: BatchRow, line: ResultLine) -> None:
        try:
            answered = await self._answer(course, row, line)
        except TeacherError as error:
            self._fail(course, row, error)
            return
        course.has_answers = True
        self._settle(course.batch, row, answered.charged or row.reserved)
        key = row.request.key
        self._context.worker.store_of_batch(
            row.request, answered, course.batch.ref, lambda: self._on_left(key)
        )

    async def _answer(self, course: _Course, row: BatchRow, line: ResultLine) -> AttemptResult:
        """Parse the reply in a line as that to a request of its own.

        Raises:
            TeacherError: it holds no answer.
        """
        context, request = self._context, row.request
        if line.status != 200:
            raise line.failure(context.endpoint)
        body = await parse_in_child.redact(context.client.redactor, line.body)
        parsed = await parse_in_child.parse(body, request.input_tokens, request.body.get("response_format"))
        parsed = flag_unasked_tool_call(parsed, request.body)
        now, usage = context.clock.wall(), parsed.usage
        context.worker.tally.usage_corrected += usage.source == USAGE_CORRECTED
        cost = cost_microusd(context.price, usage.input_tokens, usage.output_tokens, usage.cached_tokens)
        charged = row.reserved
        if usage.source != USAGE_ESTIMATED:
            charged = usage.input_tokens + usage.output_tokens, cost
            estimated = with_estimates(request, context.price)
            context.budget.learn((estimated.budget_tokens, estimated.budget_microusd), charged)
        latency_s = max(0.0, now - course.batch.at)
        raw = RawAnswer(200, {}, body, course.batch.endpoint, latency_s, now)
        return AttemptResult(raw, parsed, row.attempt_id, row.attempts, cost, charged)

    def _settle(self, batch: StoredBatch, row: BatchRow, billed: tuple[int, int]) -> None:
        context = self._context
        context.budget.correct(
            row.reserved,
            billed,
            sent_at=batch.at,
            wall=context.clock.wall(),
            in_run=batch.run in context.runs,
        )

    def _fail(self, course: _Course, row: BatchRow, error: TeacherError) -> None:
        """Decide what becomes of a row without an answer: a dead letter, or open again.

        In a batch that answers nothing, rejections say more about the configuration than about the rows: they
        are judged as those of single requests are.
        """
        is_of_row = isinstance(error, PromptRejected) or is_forbidden(error)
        if is_of_row and course.has_answers:
            failure = as_rejected_prompt(RequestFailed(error, row.attempts))
            self._settle(course.batch, row, (0, 0))
            self._note_error(error)
            at = self._context.clock.wall()
            key = row.request.key
            record = Failure(row.attempt_id, key, error.code, error.status, error.raw, False, at)
            self._context.writer.submit(record, lambda: None)
            self._context.in_flight.dead_letter(row.request, failure, course.batch.ref)
            self._on_left(key)
            return
        if isinstance(error, TeacherRefused) and not is_of_row and not course.has_answers:
            self._context.ending.fail(error)
        self._open_again(course, row, error)

    def _note_error(self, error: TeacherError) -> None:
        tally = self._context.worker.tally
        tally.note(tally.errors, error.code)
        tally.possibly_billed += error.maybe_billed

    def _open_again(self, course: _Course, row: BatchRow, error: TeacherError) -> None:
        """Take a row out of its batch; it is handed on when that is durable."""
        self._note_error(error)
        self._settle(course.batch, row, row.reserved if error.maybe_billed else (0, 0))
        record = BatchRowReopened(
            attempt_id=row.attempt_id,
            key=row.request.key,
            batch=course.batch.ref,
            endpoint=course.batch.endpoint,
            code=error.code,
            at=self._context.clock.wall(),
            status=error.status,
            raw=error.raw,
            maybe_billed=error.maybe_billed,
            reserved_tokens=row.reserved[0],
            reserved_microusd=row.reserved[1],
        )

        def stored() -> None:
            self._on_left(row.request.key)
            self._on_reopened(row, error)

        self._context.writer.submit(record, stored)

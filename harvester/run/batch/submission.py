"""Send a batch exactly once: written down, uploaded, created, and found again if any of it went unconfirmed.

A creation whose reply was lost may have been carried out. So the provider's list decides: a batch that is in
it is taken up, and one that is still not in it `[batch] settle` after it was written down was never created.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from harvester.api.batches import ProviderBatch, batch_line
from harvester.errors import Parked, RateLimited, TeacherError, TeacherUnavailable
from harvester.run.batch.context import BatchContext
from harvester.store.journal.batches import (
    BatchRow,
    BatchState,
    StoredBatch,
    change_batch,
    enter_batch,
)
from harvester.system.failpoints import reach

T = TypeVar("T")
# Seconds before a call that failed is made again, for the first time; they double.
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0


class NotCreated(Exception):
    """The provider does not have the batch: its rows were not sent. `error` says why."""

    def __init__(self, error: TeacherError | Parked) -> None:
        super().__init__(str(error))
        self.error = error


async def write_down(context: BatchContext, rows: Sequence[BatchRow]) -> StoredBatch:
    """Make a new batch durable, before anything of it is sent."""
    batch = StoredBatch(
        number=0,
        run=0,
        name=f"harvest-{secrets.token_hex(12)}",
        state=BatchState.INTENDED,
        status="",
        at=context.clock.wall(),
        rows=len(rows),
        cancel=False,
        file_id="",
        batch_id="",
        endpoint=context.endpoint,
    )
    reach("batch.before_intent")
    entered = await context.writer.call(lambda journal: enter_batch(journal, batch, rows))
    reach("batch.after_intent")
    return entered


async def send(
    context: BatchContext, batch: StoredBatch, rows: Sequence[BatchRow]
) -> tuple[StoredBatch, ProviderBatch]:
    """Upload a batch that was written down, and create it.

    Raises:
        NotCreated: the provider refuses it, or could not be reached; nothing will come of it.
        Unconfirmed: it may have been created.
    """
    content = b"".join(batch_line(row.request.key, row.request.body, context.api.path) for row in rows)
    file_id = await _until_done(context, lambda: context.client.upload(batch.name, content))
    reach("batch.after_upload")
    batch = await context.writer.call(
        lambda journal: change_batch(journal, batch, state=BatchState.UPLOADED, file_id=file_id)
    )
    reach("batch.after_upload_noted")
    ticket = await _created(context, batch)
    reach("batch.after_create")
    batch = await note_created(context, batch, ticket)
    reach("batch.after_create_noted")
    return batch, ticket


class Unconfirmed(Exception):
    """The batch may have been created: the provider's list will tell, later."""


async def _created(context: BatchContext, batch: StoredBatch) -> ProviderBatch:
    """Create a batch; a refusal for now is tried again, a lost reply is looked up.

    Raises:
        NotCreated: as `send`. Unconfirmed: neither the call nor the list was answered.
    """

    async def create() -> ProviderBatch:
        try:
            return await context.client.create(batch.file_id, batch.name)
        except TeacherError as error:
            if error.status is not None and error.status < 500 and error.status not in {408, 409}:
                raise  # refused: it was not carried out
            if isinstance(error, RateLimited):
                raise
            context.complain(error)
            raise Unconfirmed from error

    return await _until_done(context, create)


async def note_created(context: BatchContext, batch: StoredBatch, ticket: ProviderBatch) -> StoredBatch:
    """Write down that the provider has the batch."""
    return await context.writer.call(
        lambda journal: change_batch(
            journal, batch, state=BatchState.CREATED, batch_id=ticket.batch_id, status=ticket.status
        )
    )


async def _until_done(context: BatchContext, call: Callable[[], Awaitable[T]]) -> T:
    """Call until it succeeds, with waits that grow, as long as `[run] patience_s`.

    Raises:
        NotCreated: it is refused for good, does not succeed in time, or the pass drains.
    """
    wait_s, began = FIRST_WAIT_S, context.clock.now()
    while True:
        try:
            return await call()
        except TeacherError as error:
            if error.is_permanent:
                raise NotCreated(error) from error
            context.worker.tally.note(context.worker.tally.errors, error.code)
            wait_s = max(wait_s, error.retry_after_s or 0.0)
            if context.clock.now() + wait_s - began > context.config.run.patience_s:
                reason = f"the Batch API takes nothing for now: {error.message}"
                raise NotCreated(Parked(wait_s, reason)) from error
        await context.clock.wait(context.ending.draining, wait_s)
        if context.ending.draining.is_set():
            raise NotCreated(TeacherUnavailable("the run ends", place=context.endpoint))
        wait_s = min(LONGEST_WAIT_S, 2 * wait_s)

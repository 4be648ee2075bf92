"""Submit records to the writer thread from asyncio and receive its acknowledgements.

A commit acknowledges hundreds of records at once; the event loop is woken once for all of them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from harvester.errors import HarvesterError, StoreError
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Record

T = TypeVar("T")
OnAcknowledged = Callable[[BaseException | None], None]
# Most records submitted and not yet durable; `wait_for_capacity` waits while there are as many.
MAX_OPEN = 4096


class AsyncWriter:
    """Submits records to the writer thread and counts those that are not yet durable.

    `fault` is the first storage error; after it no request may be sent, because no answer can be stored.
    """

    def __init__(self, writer: GroupCommit, on_fault: Callable[[HarvesterError], None]) -> None:
        self._writer = writer
        self._on_fault = on_fault
        self._loop = asyncio.get_running_loop()
        self._acks: deque[tuple[OnAcknowledged, BaseException | None]] = deque()
        self._woken = False
        self._open = 0
        self._settled = asyncio.Event()
        self._ids = itertools.count(1)
        self.fault: HarvesterError | None = None

    async def start(self) -> None:
        """Read the first free attempt number from the journal."""
        self._ids = itertools.count(await self.call(lambda journal: journal.next_attempt_id()))

    def next_attempt_id(self, answers: int = 1) -> int:
        """Return an attempt number that was never used in this store, the first of as many as `answers`."""
        first = next(self._ids)
        for _ in range(answers - 1):
            next(self._ids)
        return first

    async def call(self, fn: Callable[[Journal], T]) -> T:
        """Run `fn(journal)` on the writer thread, after all records submitted before it."""
        return await asyncio.wrap_future(self._writer.call(fn))

    def submit(self, record: Record, done: Callable[[], None]) -> None:
        """Submit a record; `done` runs on the event loop once it is durable, and never after a fault."""
        self._submit(record, lambda error: done() if error is None else None)

    async def write_durably(self, record: Record) -> None:
        """Submit a record and wait until it is on disk.

        Raises:
            StoreError: it could not be written.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        self._submit(record, lambda error: _settle(written, error))
        await written

    async def wait_for_capacity(self) -> None:
        """Wait while too many records are not yet durable."""
        while self._open >= MAX_OPEN:
            self._settled.clear()
            await self._settled.wait()

    async def flush(self) -> None:
        """Wait until every submitted record is durable or has failed; the writer waits for no others then."""
        if self._open:
            await self.call(lambda _: None)
        while self._open:
            self._settled.clear()
            await self._settled.wait()

    def _submit(self, record: Record, on_acknowledged: OnAcknowledged) -> None:
        self._open += 1
        self._writer.submit(record, lambda error: self._acknowledge(on_acknowledged, error))

    def _acknowledge(self, on_acknowledged: OnAcknowledged, error: BaseException | None) -> None:
        """Queue an acknowledgement on the writer thread and wake the event loop, once for many of them."""
        self._acks.append((on_acknowledged, error))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take_acks)

    def _take_acks(self) -> None:
        # Cleared first: an acknowledgement that arrives during the loop below wakes the event loop again.
        self._woken = False
        while self._acks:
            on_acknowledged, error = self._acks.popleft()
            self._open -= 1
            if error is not None and self.fault is None:
                self.fault = _store_error(error)
                self._on_fault(self.fault)
            on_acknowledged(error)
        self._settled.set()


def _settle(written: asyncio.Future[None], error: BaseException | None) -> None:
    if written.done():  # its waiter was cancelled
        return
    if error is None:
        written.set_result(None)
    else:
        written.set_exception(_store_error(error))


def _store_error(error: BaseException) -> HarvesterError:
    return error if isinstance(error, HarvesterError) else StoreError(f"can't write the journal: {error}")

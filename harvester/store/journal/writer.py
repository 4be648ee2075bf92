"""The async face of the one writer thread: records go in, acknowledgements come back in batches.

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
Heard = Callable[[BaseException | None], None]
MAX_OPEN = 4096
"""Records handed over and not yet durable; `wait_for_capacity` holds producers back beyond it."""


class AsyncWriter:
    """Hands records to the writer and keeps account of what is durable.

    `fault` is the first storage error; from then on nothing may be sent, for nothing can be kept.
    """

    def __init__(self, writer: GroupCommit, on_fault: Callable[[HarvesterError], None]) -> None:
        self._writer = writer
        self._on_fault = on_fault
        self._loop = asyncio.get_running_loop()
        self._acks: deque[tuple[Heard, BaseException | None]] = deque()
        self._woken = False
        self._open = 0
        self._settled = asyncio.Event()
        self._ids = itertools.count(1)
        self.fault: HarvesterError | None = None

    async def start(self) -> None:
        """Learn the first free attempt number."""
        self._ids = itertools.count(await self.call(lambda journal: journal.next_attempt_id()))

    def next_attempt_id(self) -> int:
        """A number never used before in this store."""
        return next(self._ids)

    async def call(self, fn: Callable[[Journal], T]) -> T:
        """Run something on the writer thread, after all that was submitted before it."""
        return await asyncio.wrap_future(self._writer.call(fn))

    def submit(self, record: Record, done: Callable[[], None]) -> None:
        """Hand a record over; `done` runs on the event loop once it is durable, never on a fault."""
        self._hand_over(record, lambda error: done() if error is None else None)

    async def write_durably(self, record: Record) -> None:
        """Hand a record over and wait until it is on disk.

        Raises:
            StoreError: it could not be written.
        """
        written: asyncio.Future[None] = self._loop.create_future()
        self._hand_over(record, lambda error: _settle(written, error))
        await written

    async def wait_for_capacity(self) -> None:
        """Wait while too much is not yet durable."""
        while self._open >= MAX_OPEN:
            self._settled.clear()
            await self._settled.wait()

    async def flush(self) -> None:
        """Wait until everything handed over is durable, or failed."""
        while self._open:
            self._settled.clear()
            await self._settled.wait()

    def _hand_over(self, record: Record, heard: Heard) -> None:
        self._open += 1
        self._writer.submit(record, lambda error: self._acknowledge(heard, error))

    def _acknowledge(self, heard: Heard, error: BaseException | None) -> None:
        """On the writer thread: queue the news and wake the loop unless it is awake already."""
        self._acks.append((heard, error))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take_acks)

    def _take_acks(self) -> None:
        # Cleared first: news that arrives while we take the rest wakes the loop again.
        self._woken = False
        while self._acks:
            heard, error = self._acks.popleft()
            self._open -= 1
            if error is not None and self.fault is None:
                self.fault = _store_error(error)
                self._on_fault(self.fault)
            heard(error)
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

"""Write the journal on one thread and commit records in groups.

An fsync costs the same for one record as for hundreds, so records that arrive within 20 ms share one. After
an idle time the first record is committed at once. Order is kept: a call sees every record submitted before
it and none submitted after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from harvester.errors import StoreError
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Record

T = TypeVar("T")
Done = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class _Call:
    run: Callable[[Journal], Any]
    future: Future[Any]


_Submitted = tuple[Record, Done]


class GroupCommit:
    """The writer thread. It owns the journal until `close`: no other thread may use it.

    Args:
        max_records: most records in one transaction.
        max_wait_s: longest a record waits for others before its commit begins.
    """

    def __init__(self, journal: Journal, *, max_records: int = 256, max_wait_s: float = 0.02) -> None:
        self._journal = journal
        self._max_records = max_records
        self._max_wait_s = max_wait_s
        self._lock = threading.Lock()
        self._queued: list[_Submitted | _Call] = []
        self._closed = False
        # Two events, so that the thread wakes once a batch, not once a record: the first record of a batch
        # sets one; a full batch, a call or the end sets the other and cuts the wait short.
        self._some = threading.Event()
        self._now = threading.Event()
        self._thread = threading.Thread(target=self._write, name="journal-writer", daemon=True)
        self._thread.start()

    def submit(self, record: Record, done: Done) -> None:
        """Queue a record.

        `done(None)` is called on the writer thread when it is durable, `done(error)` when it never will be.
        It must be quick and must not raise. Acknowledgements of one commit come in a row, so a caller can
        collect them and wake its event loop once.

        Raises:
            StoreError: the writer is closed.
        """
        with self._lock:
            self._refuse_when_closed()
            self._queued.append((record, done))
            count = len(self._queued)
        if count == 1:
            self._some.set()
        if count == self._max_records:
            self._now.set()

    def call(self, fn: Callable[[Journal], T]) -> Future[T]:
        """Run `fn(journal)` on the writer thread, after everything submitted before it is durable.

        Raises:
            StoreError: the writer is closed.
        """
        future: Future[T] = Future()
        with self._lock:
            self._refuse_when_closed()
            self._queued.append(_Call(fn, future))
        self._some.set()
        self._now.set()
        return future

    def close(self) -> None:
        """Commit all queued records, stop the thread, close the journal. Safe to call twice.

        Raises:
            StoreError: the journal did not close.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._some.set()
        self._now.set()
        self._thread.join()
        self._journal.close()

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise StoreError("the journal is closed")

    def _write(self) -> None:
        begun_at = -self._max_wait_s
        while True:
            self._some.wait()
            wait_s = begun_at + self._max_wait_s - time.monotonic()
            if wait_s > 0:
                self._now.wait(wait_s)
            begun_at = time.monotonic()
            with self._lock:
                queued, self._queued = self._queued, []
                closed = self._closed
                if not closed:
                    self._some.clear()
                    self._now.clear()
            self._process(queued)
            if closed and not queued:
                return

    def _process(self, queued: Sequence[_Submitted | _Call]) -> None:
        batch: list[_Submitted] = []
        for item in queued:
            if isinstance(item, _Call):
                self._commit(batch)
                batch = []
                self._answer(item)
            else:
                batch.append(item)
                if len(batch) == self._max_records:
                    self._commit(batch)
                    batch = []
        self._commit(batch)

    def _commit(self, batch: Sequence[_Submitted]) -> None:
        if not batch:
            return
        error: BaseException | None = None
        try:
            self._journal.apply([record for record, _ in batch])
        except (TypeError, ValueError) as refused:
            if len(batch) > 1:  # one record can't be written as JSON: the others must not suffer
                for submitted in batch:
                    self._commit([submitted])
                return
            error = refused
        except BaseException as raised:  # noqa: BLE001 - passed to `done`
            error = raised
        for _, done in batch:
            with contextlib.suppress(RuntimeError):  # an event loop that was closed meanwhile
                done(error)

    def _answer(self, call: _Call) -> None:
        if not call.future.set_running_or_notify_cancel():
            return
        try:
            result = call.run(self._journal)
        except BaseException as raised:  # noqa: BLE001 - passed to the future
            call.future.set_exception(raised)
        else:
            call.future.set_result(result)


async def on_writer(writer: GroupCommit, fn: Callable[[Journal], T]) -> T:
    """Run `fn(journal)` on the writer thread and wait for its result."""
    return await asyncio.wrap_future(writer.call(fn))

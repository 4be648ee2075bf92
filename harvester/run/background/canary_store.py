"""Open the store of canaries, `canary/` inside the store of a run, for those who ask some during a pass."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from harvester.errors import Ending, StoreError
from harvester.observe.counters import Counters
from harvester.store import paths
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import RunRecord
from harvester.store.journal.writer import AsyncWriter
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.teacher import Teacher

SHARD_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks the run's teacher, and keeps what is paid in the store of canaries."""

    teacher: Teacher
    writer: AsyncWriter


class CanaryStore:
    """Opened by the first who asks in a pass, closed after the last. All of them count in one tally.

    Args:
        store: of the run.
        record: of the run.
        purpose: of what is asked.
    """

    def __init__(
        self, store: Path, record: RunRecord, purpose: str, on_error: Callable[[Exception], None]
    ) -> None:
        self.folder = store / paths.CANARY
        self.record = replace(record, purpose=purpose)
        self.spent = Counters()
        self.on_error = on_error
        self.ending = Ending.INTERRUPTED
        self._turn = asyncio.Lock()
        self._users = 0
        self._opened: tuple[GroupCommit, Asker] | None = None

    @contextlib.asynccontextmanager
    async def asker(self, endpoints: Endpoints) -> AsyncIterator[Asker]:
        """Open the store if it is not open, and close it after the block if nobody else uses it.

        Raises:
            StoreError: it can't be opened.
        """
        async with self._turn:
            if self._opened is None:
                self._opened = await self._open(endpoints)
            writer, asker = self._opened
            self._users += 1
        try:
            yield asker
        finally:
            self._users -= 1
            if not self._users:
                self._opened = None
                await asyncio.shield(asyncio.to_thread(self._close, writer))

    async def _open(self, endpoints: Endpoints) -> tuple[GroupCommit, Asker]:
        writer = GroupCommit(await asyncio.to_thread(Journal.open, self.folder))
        async_writer = AsyncWriter(writer, self.on_error)
        await async_writer.call(lambda journal: journal.begin_run(self.record))
        await async_writer.start()
        teacher = Teacher(endpoints, async_writer, self.spent, self.record.run_id)
        return writer, Asker(teacher, async_writer)

    def _close(self, writer: GroupCommit) -> None:
        from harvester.store.shards import seal

        run_id, at, ending = self.record.run_id, time.time(), self.ending
        with contextlib.suppress(StoreError):
            writer.call(
                lambda j: seal.seal(j, self.folder, target_bytes=SHARD_BYTES, everything=True)
            ).result()
            writer.call(lambda j: j.end_run(run_id, ending, 0, at)).result()
        with contextlib.suppress(StoreError):
            writer.close()

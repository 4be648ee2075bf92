"""Seal beside the pass and after it. Arrow is loaded after the first request, which need not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from pathlib import Path

from harvester.store.journal.group_commit import GroupCommit
from harvester.store.maintain.seal_hold import SealHold
from harvester.store.shards.ready_rows import ReadyRows
from harvester.system.collection import exempt_modules
from harvester.system.paused_imports import paused_imports

# Seconds after which Arrow is loaded though no request was sent.
ARROW_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class Sealing:
    """What seals the answers of one run.

    Attributes:
        target_bytes: size of a shard.
        owns_process: the process is the run's own.
        sent: is set by the first request.
        all_taken: is set when all requests were taken by workers: what is not answered yet is being asked.
        hurry: is set when Arrow is waited for.
    """

    store: Path
    writer: GroupCommit
    target_bytes: int
    owns_process: bool
    hold: SealHold = field(default_factory=SealHold)
    ready: ReadyRows = field(default_factory=ReadyRows)
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    all_taken: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: threading.Event = field(default_factory=threading.Event)
    _is_loaded: asyncio.Event = field(default_factory=asyncio.Event)

    async def seal_meanwhile(self) -> None:
        """Seal full shards until cancelled."""
        with contextlib.suppress(TimeoutError):  # what batches bring is sealed too
            await asyncio.wait_for(self.sent.wait(), ARROW_AFTER_S)
        await asyncio.to_thread(_load_arrow, self.hurry)
        if self.owns_process:
            exempt_modules()
        self._is_loaded.set()
        from harvester.store.maintain import seal_task

        await seal_task.seal_periodically(self.store, self.writer, self.target_bytes, self.hold, self.ready)

    async def convert_meanwhile(self) -> None:
        """Convert answers to columns until cancelled, so that `finish` is short."""
        await self._is_loaded.wait()
        from harvester.store.maintain import seal_task

        await seal_task.convert_periodically(self.writer, self.hold, self.ready, self.all_taken)

    async def finish(self) -> int:
        """Seal everything that is not held; return the number of rows."""
        from harvester.store.maintain import seal_task

        return await seal_task.seal_all(self.store, self.writer, self.target_bytes, self.hold, self.ready)


def _load_arrow(hurry: threading.Event) -> None:
    with paused_imports(hurry):
        import pyarrow as pa

        from harvester.store.maintain import seal_task  # noqa: F401

        pa.array([""])  # the first array looks for pandas

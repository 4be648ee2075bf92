"""status.json while a run lives, replaced atomically: a dead job can be told from a slow one."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.metrics import Snapshot
from harvester.report import write_status
from harvester.trace import Trace
from harvester.vitals import Vitals

BEAT_S = 2.0


class Heart:
    """Takes snapshots from the pass, shows them, and writes the file every two seconds."""

    def __init__(
        self, store: Path, run_id: str, rows_total: int, watch: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.latest = Snapshot()
        self._vitals = Vitals()
        self._trace = Trace(store, run_id)
        self._store = store
        self._watch = watch
        self._facts = {
            "run_id": run_id,
            "rows_total": rows_total,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": time.time(),
        }

    def note(self, snapshot: Snapshot) -> None:
        """The pass says where it is."""
        self.latest = snapshot
        told = {**snapshot.as_dict(), "waiting": snapshot.why}
        self._watch(told)
        if self._trace.is_due():
            self._trace.note(told, self._vitals.read())
            self._vitals.start_over()

    async def beat(self) -> None:
        """Write until cancelled. A disk that refuses the heartbeat ends no run: the journal will say."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._vitals.watch())
            while True:
                self.write("running")
                await asyncio.sleep(BEAT_S)

    def write(self, state: str, **more: Any) -> None:
        """Write the file now."""
        counts = self.latest.as_dict()
        waiting = counts.pop("why")
        told = {
            "state": state,
            "updated_at": time.time(),
            "waiting": waiting,
            **self._facts,
            **counts,
            **self._vitals.read(),
            **more,
        }
        if state != "running":
            self._trace.note(told, self._vitals.read())
        try:
            write_status(self._store, told)
        except OSError:
            return

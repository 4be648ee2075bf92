"""Execute what an operator asks of a running harvest: status, stop, pause, resume, set.

A pause is on disk before it is confirmed: after a crash, or a restart by a service manager, the next run
sends nothing until the operator resumes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from harvester.errors import ConfigError, Ending
from harvester.run.control.protocol import Command
from harvester.run.control.settings import RunControl
from harvester.store import pauses
from harvester.store.journal.group_commit import GroupCommit, on_writer
from harvester.store.journal.journal import Journal
from harvester.store.pauses import DRIFT, OPERATOR


class StoredPauses:
    """Pauses that outlast the process: of the operator, and of a canary that found the teacher changed.

    Args:
        teacher_id: teacher of this run; a pause for drift concerns only runs of this teacher.
    """

    def __init__(self, control: RunControl, writer: GroupCommit, teacher_id: str) -> None:
        self._control = control
        self._writer = writer
        self._teacher_id = teacher_id

    async def restore(self) -> None:
        """Take up the pauses of earlier processes, before anything can be sent."""
        stored = await on_writer(self._writer, lambda j: pauses.load(j, self._teacher_id))
        for source, reason in stored.items():
            self._control.pause(source, reason)

    async def pause_for_operator(self) -> None:
        """Pause this run, and every later one on this store, until `resume`."""
        await self._pause(OPERATOR, "paused by the operator", "")

    async def pause_for_drift(self, change: str) -> None:
        """Pause this run, and later ones of this teacher, until `resume`."""
        await self._pause(DRIFT, pauses.why_drift(change), self._teacher_id)

    async def _pause(self, source: str, reason: str, teacher_id: str) -> None:
        self._control.pause(source, f"{reason}; `harvester resume` goes on")
        await self._written(lambda j: pauses.save(j, source, reason, teacher_id))

    async def resume(self) -> None:
        """Forget these pauses, on disk first."""
        await self._written(lambda j: pauses.clear(j, self._teacher_id))
        self._control.resume(OPERATOR)
        self._control.resume(DRIFT)

    async def _written(self, write: Callable[[Journal], None]) -> None:
        """Wait until it is on disk; a client that hangs up meanwhile doesn't cancel it."""
        await asyncio.shield(on_writer(self._writer, write))


class OperatorCommands:
    """Executes the commands that come over the control socket.

    Args:
        status: returns the status of the run.
        drain: ends the run, with an ending and a detail.
    """

    def __init__(
        self,
        control: RunControl,
        stored_pauses: StoredPauses,
        status: Callable[[], Mapping[str, Any]],
        drain: Callable[[Ending, str], None],
    ) -> None:
        self._control = control
        self._stored_pauses = stored_pauses
        self._status = status
        self._drain = drain

    async def act(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Execute a request; return the reply.

        Raises:
            ConfigError: unknown command, impossible value, or the run is starting or ending.
            StoreError: paused, but not beyond this process.
        """
        command = request.get("verb")
        if command == Command.STATUS:
            return self._status()
        if command == Command.STOP:
            settings = self._control.settings
            if request.get("cancel_batches") and settings is not None:
                settings.cancel_batches_at_end()
            self._drain(Ending.STOPPED, "by `harvester stop`")
            return {"said": "it drains: nothing new is sent, what is paid for is awaited and kept"}
        if command not in list(Command):
            known = ", ".join(Command)
            raise ConfigError(f"unknown verb {command!r}", remedy=f"one of {known}")
        if self._control.is_over:
            raise ConfigError("the run is ending", remedy="wait for its end, or see `harvester status`")
        if command == Command.PAUSE:
            await self._stored_pauses.pause_for_operator()
            return {"said": "paused: nothing new is sent until `harvester resume`, also after a restart"}
        if command == Command.RESUME:
            await self._stored_pauses.resume()
            others = "; ".join(self._control.pauses.values())
            return {"said": f"resumed, but still held: {others}" if others else "resumed"}
        return {"said": f"{self._set(request)}, until this run ends"}

    def _set(self, request: Mapping[str, Any]) -> str:
        if self._control.settings is None:
            raise ConfigError("the run is starting", remedy="try again in a moment")
        return self._control.settings.set(str(request.get("name", "")), str(request.get("value", "")))

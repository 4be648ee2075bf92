"""What may be asked of a living run, and what it answers: status, stop, hold, resume, set.

A hold is on disk before it is confirmed: a process that is killed, or restarted by a service manager, does
not begin to spend again before somebody says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from harvester.errors import ConfigError, Ending, RunState
from harvester.run.control.settings import RuntimeSettings
from harvester.run.heartbeat import Heartbeat
from harvester.store import pauses
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.maintain.seal_task import on_writer
from harvester.store.pauses import DRIFT, OPERATOR


class OperatorCommands:
    """Steers one run, on its event loop.

    Args:
        teacher_id: whose runs a canary's hold is for.
        drain: ends the run, with an ending and a detail.
    """

    def __init__(
        self, heart: Heartbeat, writer: GroupCommit, teacher_id: str, drain: Callable[[Ending, str], None]
    ) -> None:
        self._heart = heart
        self._writer = writer
        self._teacher_id = teacher_id
        self._drain = drain
        self._holds: dict[str, str] = {}

    async def recall(self) -> None:
        """Take up the holds that outlived their processes, before anything can be sent."""
        self._holds = await on_writer(self._writer, lambda j: pauses.load(j, self._teacher_id))

    def take(self, levers: RuntimeSettings) -> None:
        """The pass has levers now."""
        self._heart.levers = levers
        for who, why in self._holds.items():
            levers.hold(who, why)

    async def changed(self, said: str) -> None:
        """A canary found the teacher changed: this run and the next are held until `resume`."""
        await self._hold(DRIFT, f"the teacher changed ({said})", self._teacher_id)

    async def _hold(self, who: str, why: str, teacher_id: str = "") -> None:
        self._holds[who] = f"{why}; `harvester resume` goes on"
        if self._heart.levers is not None:
            self._heart.levers.hold(who, self._holds[who])
        await self._written(lambda j: pauses.save(j, who, why, teacher_id))

    async def act(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Do what came over the socket, and say what is true now.

        Raises:
            ConfigError: nothing we can do. StoreError: held, but not beyond this process.
        """
        verb, levers = asked.get("verb"), self._heart.levers
        if verb == "status":
            return self._heart.told()
        if verb == "stop":
            self._drain(Ending.STOPPED, "by `harvester stop`")
            return {"said": "it drains: nothing new is sent, what is paid for is awaited and kept"}
        starting = levers is None and self._heart.state == RunState.RUNNING
        if levers is None and not (starting and verb in {"pause", "resume"}):
            raise ConfigError(
                f"the run is {'starting' if starting else 'ending'}",
                remedy="try again in a moment" if starting else "wait for its end, or see `harvester status`",
            )
        if verb == "pause":
            await self._hold(OPERATOR, "paused by the operator")
            return {"said": "paused: nothing new is sent until `harvester resume`, also after a restart"}
        if verb == "resume":
            return {"said": await self._resume()}
        if verb == "set" and levers is not None:
            said = levers.set(str(asked.get("name", "")), str(asked.get("value", "")))
            return {"said": f"{said}, until this run ends"}
        raise ConfigError(f"unknown verb {verb!r}", remedy="status, pause, resume, stop or set")

    async def _written(self, note: Callable[[Journal], None]) -> None:
        """Wait until it is on disk; it gets there also when whoever asked has lost patience."""
        await asyncio.shield(on_writer(self._writer, note))

    async def _resume(self) -> str:
        await self._written(lambda j: pauses.clear(j, self._teacher_id))
        self._holds.clear()
        levers = self._heart.levers
        if levers is None:
            return "resumed"
        levers.release(OPERATOR)
        levers.release(DRIFT)
        held = "; ".join(levers.holds.values())
        return f"resumed, but still held: {held}" if held else "resumed"

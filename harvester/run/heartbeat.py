"""The one account of a living run: every two seconds as status.json, replaced atomically, and when asked.

`told` is the single source of what the live display, the control socket, metrics and the service manager
show; data/FORMAT.md names its fields.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.config.schedule import OpeningHours
from harvester.errors import Ending, RunState
from harvester.observe.counters import Snapshot
from harvester.observe.eta import Ahead, Forecast, Point, Span, Work
from harvester.observe.process_stats import ProcessStats
from harvester.observe.sd_notify import ServiceNotifier
from harvester.observe.status import rows_done, status_lines, write_status
from harvester.observe.timeline import TimelineWriter
from harvester.prompts.feed import PromptFeed
from harvester.run.control.settings import RuntimeSettings

BEAT_S = 2.0
COMPLAINTS_KEPT = 20
MORE_TIME_S = 30.0
"""What every beat of an ending asks of a service manager."""
Watch = Callable[[Mapping[str, Any]], None]


class Heartbeat:
    """Takes snapshots from the pass, shows them, and writes the file every two seconds.

    Args:
        facts: what does not change: run_id and what the run set out to do (`rows_total`, `input_tokens_total`
            as estimated).
        inbox: counts what the pass has taken to do.
        watch: shown every snapshot.
    """

    def __init__(
        self,
        store: Path,
        facts: Mapping[str, Any],
        inbox: PromptFeed,
        watch: Watch,
        hours: OpeningHours | None = None,
    ) -> None:
        self.latest = Snapshot()
        self.levers: RuntimeSettings | None = None
        self.state: RunState | Ending = RunState.RUNNING
        self.canary: Mapping[str, Any] = {}
        self._gauges: Mapping[str, Any] = {"limits": {}, "budget": {}}
        self._store = store
        self._inbox = inbox
        self._watch = watch
        self._hours = hours or OpeningHours()
        self._forecast = Forecast()
        self._complaints: list[str] = []
        self._vitals = ProcessStats()
        self._trace = TimelineWriter(store, str(facts["run_id"]))
        self._notify = ServiceNotifier()
        self._active_s = 0.0
        self._noted_at = time.monotonic()
        self._facts = {
            **facts,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": time.time(),
        }

    def note(self, snapshot: Snapshot) -> None:
        """The pass says where it is."""
        self.latest = snapshot
        now = time.monotonic()
        if not self._held:
            self._active_s += now - self._noted_at
        self._noted_at = now
        self._forecast.note(
            Point(
                now,
                self._active_s,
                snapshot.requests_sent,
                snapshot.rate_limited,
                snapshot.answers_stored,
                snapshot.input_tokens,
                snapshot.output_tokens,
                snapshot.cost_microusd,
            )
        )
        told = self.told()
        self._watch(told)
        if self._trace.is_due():
            self._trace.note(told, self._vitals.read())
            self._vitals.start_over()

    def complain(self, error: Exception) -> None:
        """Something went wrong that ends no run: whoever looks is told."""
        self._complaints = [*self._complaints, str(error)][-COMPLAINTS_KEPT:]

    def turn(self, state: RunState) -> None:
        """Another state from now on; whoever looks sees it at once."""
        self.state = state
        self._beat()

    async def beat(self) -> None:
        """Write until cancelled. A disk that refuses the heartbeat ends no run: the journal will say."""
        self._notify.ready()
        every_s = min(BEAT_S, (self._notify.watchdog_s or BEAT_S * 3) / 3)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._vitals.watch())
            while True:
                self._beat()
                await asyncio.sleep(every_s)

    def _beat(self) -> None:
        told = self.write()
        if self.state in {RunState.DRAINING, RunState.SEALING}:
            self._notify.stopping(MORE_TIME_S)
        else:
            self._notify.beat("; ".join(status_lines(told)[:2]))

    def end(self, ending: Ending, exit_code: int) -> None:
        """The last word: how the run ended."""
        self.state = ending
        told = self.write(exit_code=exit_code)
        self._watch(told)
        self._trace.note(told, self._vitals.read())

    @property
    def _held(self) -> bool:
        return self.levers is not None and bool(self.levers.holds)

    def told(self) -> dict[str, Any]:
        """Everything, now. Times are Unix seconds, rates per minute over the last minute."""
        counts = self.latest.as_dict()
        waiting = counts.pop("waiting")
        holds = dict(self.levers.holds) if self.levers else {}
        state = RunState.ON_HOLD if self.state == RunState.RUNNING and holds else self.state
        told = {
            "state": state,
            "updated_at": time.time(),
            "waiting": waiting,
            "holds": holds,
            **self._facts,
            "rows_total": max(self._facts["rows_total"], self._inbox.rows),
            **counts,
            "rates": {
                f"{name}_per_minute": round(self._forecast.per_minute(counter), 1)
                for name, counter in (("requests", "sent"), ("answers", "answers"), ("tokens", "tokens"))
            },
            "refused_share": round(self._forecast.refused_share(), 4),
            **self._gauged(),
            "complaints": list(self._complaints),
            "canary": dict(self.canary),
            **self._vitals.read(),
        }
        return {**told, **self._ahead(told)}

    def _gauged(self) -> Mapping[str, Any]:
        """Limits and budget; when the pass is over, as they were last."""
        if self.levers is not None:
            self._gauges = self.levers.gauges()
        return self._gauges

    def _ahead(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What is left, and when it will be done within the hours; null where nobody knows yet."""
        taken, inbox = rows_done(told), self._inbox
        guess = inbox.input_tokens / inbox.rows if inbox.rows else 0.0
        rows = max(0, told["rows_total"] - taken)
        unread = max(0, self._facts["input_tokens_total"] - inbox.input_tokens)
        ahead = self._forecast.ahead(Work(rows, unread + max(0, inbox.rows - taken) * guess, guess))
        return {
            "rows_left": rows,
            "tokens_left": _range(ahead, "tokens"),
            "eta_s": _range(ahead, "seconds"),
            "done_at": self._done_at(ahead),
            "cost_projected_microusd": _range(ahead, "cost_microusd", self.canary.get("cost_microusd", 0)),
            "closes_at": self._hours.closes_at(told["updated_at"]) if self._hours.openings else None,
            "finish_by": self._hours.finish_by,
        }

    def _done_at(self, ahead: Ahead | None) -> dict[str, float | None] | None:
        if ahead is None:
            return None
        now, seconds = time.time(), ahead.seconds
        return {name: self._hours.after(now, getattr(seconds, name)) for name in ("low", "likely", "high")}

    def write(self, **more: Any) -> dict[str, Any]:
        """Write the file now; returns what it says."""
        told = {**self.told(), **more}
        with contextlib.suppress(OSError):
            write_status(self._store, told)
        return told


def _range(ahead: Ahead | None, name: str, beside: float = 0.0) -> dict[str, float] | None:
    if ahead is None:
        return None
    span: Span = getattr(ahead, name)
    return {side: round(getattr(span, side) + beside, 1) for side in ("low", "likely", "high")}

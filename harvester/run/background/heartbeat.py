"""Write status.json every two seconds during a run, and return the same status when asked.

`Heartbeat.status` is the single source of what the live display, the control socket, metrics and the service
manager show; data/FORMAT.md names its fields.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.config.schedule import OpeningHours
from harvester.errors import Ending, RunState
from harvester.observe.counters import Snapshot
from harvester.observe.eta import Ahead, Forecast, Limits, Point, Span, Work
from harvester.observe.process_stats import ProcessStats
from harvester.observe.sd_notify import ServiceNotifier
from harvester.observe.status import budget_texts, rows_done, status_lines, write_status
from harvester.observe.timeline import TimelineWriter
from harvester.prompts.feed import PromptFeed
from harvester.run.control.settings import RunControl

BEAT_S = 2.0
COMPLAINTS_KEPT = 20
# Limits of the status by which the time left is bounded.
_RATES = ("requests_per_minute", "tokens_per_minute")

# Seconds that each beat of a draining or sealing run asks of a service manager before it kills the process.
MORE_TIME_S = 30.0

Watch = Callable[[Mapping[str, Any]], None]


class ErrorLog:
    """The last errors that did not end the run. All parts of a run report to one log."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, error: Exception) -> None:
        """Note one error; the oldest is forgotten."""
        self.messages = [*self.messages, str(error)][-COMPLAINTS_KEPT:]


@dataclass(frozen=True, slots=True)
class StatusSources:
    """What a status is put together from, besides the counters of the pass.

    `facts` don't change: run_id, config, model, and `rows_total` and `input_tokens_total` as estimated.
    `canary` is what the canary task found so far, `mirror` how far the mirror is; None without one.
    """

    facts: Mapping[str, Any]
    feed: PromptFeed
    control: RunControl
    errors: ErrorLog
    canary: Mapping[str, Any]
    hours: OpeningHours
    mirror: Mapping[str, Any] | None = None


class Heartbeat:
    """Takes snapshots from the pass, shows them, and writes status.json.

    Args:
        store: folder of status.json and of the time line.
        sources: the rest of the status.
        watch: is shown the status at every snapshot.
        notifier: tells the service manager.
    """

    def __init__(self, store: Path, sources: StatusSources, watch: Watch, notifier: ServiceNotifier) -> None:
        self.latest = Snapshot()
        self._state: RunState | Ending = RunState.RUNNING
        self._store = store
        self._sources = sources
        self._watch = watch
        self._forecast = Forecast()
        self._process_stats = ProcessStats()
        self._timeline = TimelineWriter(store, str(sources.facts["run_id"]))
        self._notifier = notifier
        self._active_s = 0.0
        self._noted_at = time.monotonic()
        self._facts = {
            **sources.facts,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started_at": time.time(),
        }

    def note(self, snapshot: Snapshot) -> None:
        """Take the counters of the pass, and show the status."""
        self.latest = snapshot
        now = time.monotonic()
        if not self._sources.control.pauses:
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
        status = self.status()
        self._watch(status)
        if self._timeline.is_due():
            self._timeline.note(status, self._process_stats.read())
            self._process_stats.start_over()

    def set_state(self, state: RunState) -> None:
        """Change the state and write it at once."""
        self._state = state
        self._beat()

    async def beat(self) -> None:
        """Write until cancelled. A disk that refuses the heartbeat ends no run: the journal will."""
        self._notifier.ready()
        every_s = min(BEAT_S, (self._notifier.watchdog_s or BEAT_S * 3) / 3)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._process_stats.watch())
            while True:
                self._beat()
                await asyncio.sleep(every_s)

    def _beat(self) -> None:
        status = self._write(self.status())
        if self._state in {RunState.DRAINING, RunState.SEALING}:
            self._notifier.stopping(MORE_TIME_S)
        else:
            budgets = budget_texts(status["budgets"])
            self._notifier.beat("; ".join([*status_lines(status)[:2], *budgets]))

    def end(self, ending: Ending, exit_code: int, why: str) -> None:
        """Write and show how the run ended, and why; "" where the ending says it."""
        self._state = ending
        status = self._write({**self.status(), "exit_code": exit_code, "why": why})
        self._watch(status)
        self._timeline.note(status, self._process_stats.read())

    def _write(self, status: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            write_status(self._store, status)
        return status

    def status(self) -> dict[str, Any]:
        """Return the whole status. Times are Unix seconds, rates per minute over the last minute."""
        sources = self._sources
        counts = self.latest.as_dict()
        pauses = dict(sources.control.pauses)
        is_paused = self._state == RunState.RUNNING and bool(pauses)
        waiting = counts.pop("waiting")
        status = {
            "state": RunState.ON_HOLD if is_paused else self._state,
            "updated_at": time.time(),
            "waiting": "; ".join(pauses.values()) if is_paused else waiting,
            "holds": pauses,
            **self._facts,
            "rows_total": max(self._facts["rows_total"], sources.feed.rows) + sources.feed.further_rows,
            **counts,
            "rates": {
                f"{name}_per_minute": round(self._forecast.per_minute(counter), 1)
                for name, counter in (("requests", "sent"), ("answers", "answers"), ("tokens", "tokens"))
            },
            "refused_share": round(self._forecast.refused_share(), 4),
            **sources.control.gauges(),
            "complaints": list(sources.errors.messages),
            "canary": dict(sources.canary),
            **({} if sources.mirror is None else {"mirror": dict(sources.mirror)}),
            **self._process_stats.read(),
        }
        return {**status, **self._ahead(status)}

    def _ahead(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is left and when it will be done within the opening hours; None where unknown yet."""
        taken, feed, hours = rows_done(status), self._sources.feed, self._sources.hours
        tokens_per_row = feed.input_tokens / feed.rows if feed.rows else 0.0
        rows = max(0, status["rows_total"] - taken)
        unread = max(0, self._facts["input_tokens_total"] - feed.input_tokens)
        input_tokens = unread + max(0, feed.rows + feed.further_rows - taken) * tokens_per_row
        known = {name: rate for name, rate in status["limits"].items() if name in _RATES and rate}
        ahead = self._forecast.ahead(Work(rows, input_tokens, tokens_per_row), Limits(**known))
        canary_microusd = self._sources.canary.get("cost_microusd", 0)
        return {
            "rows_left": rows,
            "tokens_left": _range(ahead, "tokens"),
            "eta_s": _range(ahead, "seconds"),
            "done_at": self._done_at(ahead),
            "cost_projected_microusd": _range(ahead, "cost_microusd", canary_microusd),
            "closes_at": hours.closes_at(status["updated_at"]) if hours.openings else None,
            "finish_by": hours.finish_by,
        }

    def _done_at(self, ahead: Ahead | None) -> dict[str, float | None] | None:
        if ahead is None:
            return None
        now, seconds, hours = time.time(), ahead.seconds, self._sources.hours
        return {name: hours.after(now, getattr(seconds, name)) for name in ("low", "likely", "high")}


def _range(ahead: Ahead | None, name: str, extra: float = 0.0) -> dict[str, float] | None:
    """Return a span of the forecast as JSON, each value with `extra` added."""
    if ahead is None:
        return None
    span: Span = getattr(ahead, name)
    return {side: round(getattr(span, side) + extra, 1) for side in ("low", "likely", "high")}

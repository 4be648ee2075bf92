"""Draw the status of a run on a terminal: a bar for rows, a bar for the budget, and a few lines of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harvester.errors import RunState
from harvester.observe.status import rows_done
from harvester.observe.status_line import money, rows
from harvester.system.command_line.displays import can_draw, drawing_console
from harvester.system.safe_text import one_line

Status = Mapping[str, Any]
_STATE_STYLES: Mapping[str, str] = {
    RunState.RUNNING: "green",
    RunState.ON_HOLD: "yellow",
    RunState.DRAINING: "yellow",
}


@contextmanager
def live(title: str, console: Console | None = None) -> Iterator[Callable[[Status], None]]:
    """Draw each status given to the yielded function in place of the one before; the last one stays."""
    started = time.monotonic()
    with Live(
        console=console or drawing_console(), refresh_per_second=4, vertical_overflow="crop"
    ) as display:
        yield lambda status: display.update(
            render(title, status, _elapsed(status, time.monotonic() - started))
        )


def _elapsed(status: Status, shown_s: float) -> float:
    """Return the seconds since the run began, which may be earlier than the display; `shown_s` if unknown."""
    began, now = status.get("started_at"), status.get("updated_at")
    return max(0.0, now - began) if began and now else shown_s


@contextmanager
def where_it_can_be_shown(title: str) -> Iterator[Callable[[Status], None]]:
    """Draw as `live` does, in a notebook or on a terminal; elsewhere do nothing."""
    if not can_draw():
        yield lambda _: None
        return
    with live(title) as show:
        yield show


def render(title: str, status: Status, elapsed_s: float) -> RenderableType:
    """Draw one status."""
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    state = str(status.get("state", ""))
    style = _STATE_STYLES.get(state, "bold")
    name = Text(one_line(f"{title}  {status.get('model', '')}"), style="bold")
    head.add_row(name, Text(f"{state}  {_clock(elapsed_s)}", style=style))
    body = Table.grid(expand=True, padding=(0, 1))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, value in [*_bars(status), *((label, Text(one_line(text))) for label, text in rows(status))]:
        body.add_row(label, value)
    return Group(head, body)


def _bars(status: Status) -> list[tuple[str, RenderableType]]:
    done, total = rows_done(status), status.get("rows_total", 0)
    bars = [("rows", _bar(done, total, f"{done:,} of {total:,}"))]
    budget = status.get("budget") or {}
    if budget.get("tokens") and not budget.get("microusd"):
        spent = budget.get("tokens_spent") or 0
        bars.append(("budget", _bar(spent, budget["tokens"], f"{spent:,} of {budget['tokens']:,} tokens")))
    else:
        spent = budget.get("microusd_spent") or status.get("cost_microusd") or 0
        bars.append(("budget", _bar(spent, budget.get("microusd") or 0, money(status))))
    return bars


def _bar(done: float, total: float, text: str) -> RenderableType:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    if not total:
        row.add_row(Text("no limit", style="dim"), text)
        return row
    share = f"{min(1.0, done / total):.0%}"
    done = min(done, total)
    bar = ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")
    row.add_row(bar, Text(f"{text}  {share:>4}"))
    return row


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

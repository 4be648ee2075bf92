"""Draw the status of a run on a terminal: a bar for rows, a bar for the budget, and a few lines of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harvester.errors import RunState
from harvester.observe.status import budget_texts, calendar, replica_texts, rows_done, span
from harvester.system.command_line.displays import TolerantStream, can_draw, in_notebook
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
    console = console or Console(
        file=cast(IO[str], TolerantStream(sys.stderr)), markup=False, highlight=False
    )
    started = time.monotonic()
    with Live(console=console, refresh_per_second=4, vertical_overflow="crop") as display:
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
    with live(title, Console(markup=False, highlight=False) if in_notebook() else None) as show:
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


def rows(status: Status) -> list[tuple[str, str]]:
    """Return (label, text) for rate and limits, requests in flight, time left, counts, errors, notes."""
    rates, limits = status.get("rates") or {}, status.get("limits") or {}
    requests, tokens = rates.get("requests_per_minute", 0.0), rates.get("tokens_per_minute", 0.0)
    lines = [
        (
            "rate",
            f"{requests:,.0f} requests/min{_of(requests, limits.get('requests_per_minute'))}, "
            f"{tokens:,.0f} tokens/min{_of(tokens, limits.get('tokens_per_minute'))}, "
            f"{status.get('refused_share', 0):.1%} refused (429)",
        )
    ]
    waiting = f", waiting: {status['waiting']}" if status.get("waiting") else ""
    lines.append(
        ("flight", f"{status.get('in_flight', 0):,} of a window of {status.get('window', 0):,}{waiting}")
    )
    lines += [("learned", text) for text in status.get("learned") or []]
    lines += [("address", text) for text in replica_texts(status)]
    if (eta := status.get("eta_s")) and eta["high"] >= 1:
        lines.append(("left", f"{span(eta['low'])} to {span(eta['high'])}{_projected(status)}"))
    lines += calendar(status)
    counts = [
        f"{status.get('answers_stored', 0):,} answers",
        f"{status.get('from_cache', 0):,} from cache",
        *(f"{status[name]:,} {label}" for name, label in _COUNTS if status.get(name)),
    ]
    lines.append(("so far", ", ".join(counts)))
    if status.get("errors"):
        errors = sorted(status["errors"].items(), key=lambda item: -item[1])
        lines.append(("errors", ", ".join(f"{code} {count:,}" for code, count in errors)))
    lasting = {name: budget for name, budget in (status.get("budgets") or {}).items() if name != "run"}
    lines += [("budget", text) for text in budget_texts(lasting)]
    if (status.get("canary") or {}).get("changes"):
        lines.append(("teacher", f"changed: {status['canary'].get('said', '')}"))
    if status.get("complaints") and status["complaints"][-1] != (status.get("canary") or {}).get("said"):
        lines.append(("note", str(status["complaints"][-1])))
    return lines


# Labels of `rows` that `status_line` leaves out.
_LONG = frozenset({"note", "done", "hours", "learned", "address"})

# Fields of the status that are shown if they are not 0, and their labels.
_COUNTS = (
    ("duplicates", "shared"),
    ("dead", "failed"),
    ("retries", "retries"),
    ("possibly_billed", "possibly billed"),
)


def status_line(status: Status, total: int) -> str:
    """Return the status as one line, for a log."""
    done = rows_done(status)
    parts = [f"{done:,}/{max(total, status.get('rows_total', 0)):,} rows, {money(status)}"]
    parts += [
        f"{text} left" if label == "left" else text for label, text in rows(status) if label not in _LONG
    ]
    return one_line("; ".join(parts))


def money(status: Status) -> str:
    """Return the cost so far, canaries included, and the budget if there is one."""
    canaries = (status.get("canary") or {}).get("cost_microusd", 0)
    cost = f"${(status.get('cost_microusd', 0) + canaries) / 1e6:.4f}"
    limit_microusd = (status.get("budget") or {}).get("microusd")
    return f"{cost} of ${limit_microusd / 1e6:,.2f}" if limit_microusd else cost


def _bars(status: Status) -> list[tuple[str, RenderableType]]:
    done, total = rows_done(status), status.get("rows_total", 0)
    bars = [("rows", _bar(done, total, f"{done:,} of {total:,}"))]
    budget = status.get("budget") or {}
    if budget.get("tokens") and not budget.get("microusd"):
        spent = budget.get("tokens_spent", 0)
        bars.append(("budget", _bar(spent, budget["tokens"], f"{spent:,} of {budget['tokens']:,} tokens")))
    else:
        spent = budget.get("microusd_spent") or status.get("cost_microusd", 0)
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


def _of(rate: float, limit: float | None) -> str:
    return f" of {limit:,.0f} ({rate / limit:.0%})" if limit else ""


def _projected(status: Status) -> str:
    cost = status.get("cost_projected_microusd")
    return f", ${cost['low'] / 1e6:.4f} to ${cost['high'] / 1e6:.4f} in all" if cost and cost["high"] else ""


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

"""What a living run looks like on a terminal: two bars, and what they don't say. Fed with the status."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harvester.errors import RunState
from harvester.observe.status import calendar, rows_done, span
from harvester.system.safe_text import one_line

Told = Mapping[str, Any]
_STATE_STYLES: Mapping[str, str] = {
    RunState.RUNNING: "green",
    RunState.ON_HOLD: "yellow",
    RunState.DRAINING: "yellow",
}


@contextmanager
def live(title: str, console: Console | None = None) -> Iterator[Callable[[Told], None]]:
    """A display that redraws itself in place while the block lives; its last state stays on the screen."""
    console = console or Console(file=cast(IO[str], Patient(sys.stderr)), markup=False, highlight=False)
    began = time.monotonic()
    with Live(console=console, refresh_per_second=4, vertical_overflow="crop") as display:
        yield lambda told: display.update(picture(title, told, time.monotonic() - began))


class Patient:
    """A stream that may go away: a closed terminal swallows what is painted, and ends no run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        """Write, or don't."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or don't."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Only a terminal is painted on."""
        return True

    def fileno(self) -> int:
        """For the terminal's size."""
        return self._stream.fileno()


def picture(title: str, told: Told, elapsed_s: float) -> RenderableType:
    """One snapshot, drawn."""
    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    head.add_column(justify="right", no_wrap=True)
    state = str(told.get("state", ""))
    style = _STATE_STYLES.get(state, "bold")
    name = Text(one_line(f"{title}  {told.get('model', '')}"), style="bold")
    head.add_row(name, Text(f"{state}  {_clock(elapsed_s)}", style=style))
    body = Table.grid(expand=True, padding=(0, 1))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, value in [*_bars(told), *((label, Text(one_line(said))) for label, said in words(told))]:
        body.add_row(label, value)
    return Group(head, body)


def words(told: Told) -> list[tuple[str, str]]:
    """What is worth a line: rate beside limit, what holds it back, what is left, what went wrong."""
    rates, limits = told.get("rates") or {}, told.get("limits") or {}
    requests, tokens = rates.get("requests_per_minute", 0.0), rates.get("tokens_per_minute", 0.0)
    lines = [
        (
            "rate",
            f"{requests:,.0f} requests/min{_of(requests, limits.get('requests_per_minute'))}, "
            f"{tokens:,.0f} tokens/min{_of(tokens, limits.get('tokens_per_minute'))}, "
            f"{told.get('refused_share', 0):.1%} refused (429)",
        )
    ]
    waiting = f", waiting: {told['waiting']}" if told.get("waiting") else ""
    lines.append(
        ("flight", f"{told.get('in_flight', 0):,} of a window of {told.get('window', 0):,}{waiting}")
    )
    if eta := told.get("eta_s"):
        lines.append(("left", f"{span(eta['low'])} to {span(eta['high'])}{_projected(told)}"))
    lines += calendar(told)
    counts = [
        f"{told.get('answers_stored', 0):,} answers",
        f"{told.get('from_cache', 0):,} from cache",
        *(f"{told[name]:,} {say}" for name, say in _WORTH_SAYING if told.get(name)),
    ]
    lines.append(("so far", ", ".join(counts)))
    if told.get("errors"):
        met = sorted(told["errors"].items(), key=lambda item: -item[1])
        lines.append(("errors", ", ".join(f"{code} {count:,}" for code, count in met)))
    if (told.get("canary") or {}).get("changes"):
        lines.append(("teacher", f"changed: {told['canary'].get('said', '')}"))
    if told.get("complaints") and told["complaints"][-1] != (told.get("canary") or {}).get("said"):
        lines.append(("note", str(told["complaints"][-1])))
    return lines


_LONG = frozenset({"note", "done", "hours"})
"""What a line in a log leaves out."""
_WORTH_SAYING = (
    ("duplicates", "shared"),
    ("dead", "failed"),
    ("retries", "retries"),
    ("possibly_billed", "possibly billed"),
)


def sentence(told: Told, total: int) -> str:
    """The same on one line, for a log."""
    done = rows_done(told)
    said = [f"{done:,}/{max(total, told.get('rows_total', 0)):,} rows, {money(told)}"]
    said += [f"{text}" for label, text in words(told) if label not in _LONG]
    return one_line("; ".join(said))


def money(told: Told) -> str:
    """Cost so far, canaries included, of the ceiling where there is one."""
    canaries = (told.get("canary") or {}).get("cost_microusd", 0)
    cost = f"${(told.get('cost_microusd', 0) + canaries) / 1e6:.4f}"
    ceiling = (told.get("budget") or {}).get("microusd")
    return f"{cost} of ${ceiling / 1e6:,.2f}" if ceiling else cost


def _bars(told: Told) -> list[tuple[str, RenderableType]]:
    done, total = rows_done(told), told.get("rows_total", 0)
    bars = [("rows", _bar(done, total, f"{done:,} of {total:,}"))]
    budget = told.get("budget") or {}
    if budget.get("tokens") and not budget.get("microusd"):
        spent = budget.get("tokens_spent", 0)
        bars.append(("budget", _bar(spent, budget["tokens"], f"{spent:,} of {budget['tokens']:,} tokens")))
    else:
        spent = budget.get("microusd_spent") or told.get("cost_microusd", 0)
        bars.append(("budget", _bar(spent, budget.get("microusd") or 0, money(told))))
    return bars


def _bar(done: float, total: float, said: str) -> RenderableType:
    row = Table.grid(expand=True, padding=(0, 1))
    row.add_column(ratio=1)
    row.add_column(justify="right", no_wrap=True)
    if not total:
        row.add_row(Text("no ceiling", style="dim"), said)
        return row
    share = f"{min(1.0, done / total):.0%}"
    done = min(done, total)
    bar = ProgressBar(total=total, completed=done, complete_style="cyan", finished_style="green")
    row.add_row(bar, Text(f"{said}  {share:>4}"))
    return row


def _of(rate: float, limit: float | None) -> str:
    return f" of {limit:,.0f} ({rate / limit:.0%})" if limit else ""


def _projected(told: Told) -> str:
    cost = told.get("cost_projected_microusd")
    return f", ${cost['low'] / 1e6:.4f} to ${cost['high'] / 1e6:.4f} in all" if cost and cost["high"] else ""


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

"""Show a training on the terminal: figures that are drawn anew where rich can draw, else lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harvester.system.command_line.displays import can_draw, drawing_console
from harvester.system.safe_text import one_line
from trainer.console import print_message, progress_fifths
from trainer.live.figures import UNKNOWN_MFU, Figures, TrainingEvent, held_out_words
from trainer.training.logbook import Evaluation, Sampled, StepLog, TrainingStarted

if TYPE_CHECKING:
    from rich.console import RenderableType

# Characters of a prompt or an answer in a line.
MOST_TEXT = 160

Show = Callable[[TrainingEvent], None]


@contextmanager
def training_display() -> Iterator[Show]:
    """Show the events that the yielded function gets, on stderr; the last figures stay."""
    if can_draw():
        with _drawn() as show:
            yield show
    else:
        yield _printer()


def _printer() -> Show:
    """Return a function that prints lines: notes, evaluations, samples, and figures now and then."""
    figures, update = Figures(), progress_fifths("train", "steps")
    has_said_mfu = False

    def show(event: TrainingEvent) -> None:
        nonlocal has_said_mfu
        figures.add(event)
        for line in [*event_lines(event), *sample_lines(event)]:
            print_message(line)
        if isinstance(event, StepLog) and event.mfu is None and not has_said_mfu:
            has_said_mfu = True
            print_message(f"MFU {UNKNOWN_MFU}")
        if isinstance(event, TrainingStarted | StepLog):
            update(figures.steps_done, figures.steps, figures.detail)

    return show


def event_lines(event: TrainingEvent) -> list[str]:
    """Return what an event has to say beyond the figures of a step."""
    match event:
        case TrainingStarted():
            return list(event.notes)
        case Evaluation():
            return [f"step {event.step:,}: {held_out_words(event)}"]
    return []


def sample_lines(event: TrainingEvent) -> list[str]:
    """Return a line for each sampled answer of an event; foreign text is escaped and cut."""
    if not isinstance(event, Evaluation | Sampled):
        return []
    return [
        f"step {event.step:,}: {shown(answer.get('prompt_id'))}: student {shown(answer.get('answer'))!r}, "
        f"teacher {shown(answer.get('teacher'))!r}"
        for answer in event.answers
    ]


def shown(text: str | None) -> str:
    """Return foreign text as one short line without control characters."""
    line = one_line(text or "")
    return line if len(line) <= MOST_TEXT else f"{line[: MOST_TEXT - 1]}…"


@contextmanager
def _drawn() -> Iterator[Show]:
    """Draw the figures in place of those before; notes and evaluations are printed above them."""
    from rich.live import Live

    console, figures = drawing_console(), Figures()
    with Live(console=console, get_renderable=lambda: render(figures), refresh_per_second=2):

        def show(event: TrainingEvent) -> None:
            figures.add(event)
            for line in event_lines(event):
                console.print(one_line(line))

        yield show


def render(figures: Figures) -> RenderableType:
    """Return the figures as something that rich draws: a bar, a line for each figure, the newest answers."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(expand=True, padding=(0, 1))
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(justify="right", no_wrap=True)
    share = f"{figures.steps_done / figures.steps:.0%}" if figures.steps else ""
    bar = ProgressBar(total=figures.steps or 1, completed=figures.steps_done, complete_style="cyan")
    head.add_row(
        Text("train", style="bold"),
        bar,
        Text(f"{figures.steps_done:,} of {figures.steps:,} steps  {share:>4}"),
    )
    body = Table.grid(expand=True, padding=(0, 1))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for label, text in rows(figures):
        body.add_row(label, Text(one_line(text)))
    return Group(head, body)


def rows(figures: Figures) -> list[tuple[str, str]]:
    """Return (label, text) for loss, speed, MFU, memory, time left and the newest answers."""
    line = figures.line
    if line is None:
        return [("", "first step")]
    left = "nothing" if figures.steps_done >= figures.steps else figures.left
    held_out = f"; {figures.held_out_text}" if figures.held_out_text else ""
    lines = [
        ("loss", f"{line.loss:.4f}, epoch {line.epoch + 1}{held_out}"),
        ("speed", f"{line.tokens_per_s:,.0f} tokens/s"),
        ("MFU", figures.mfu),
        ("memory", f"{figures.memory} at most"),
        ("left", left),
    ]
    for answer in figures.answers:
        lines.append(("prompt", shown(answer.get("prompt") or answer.get("prompt_id"))))
        lines.append(("student", shown(answer.get("answer"))))
        lines.append(("teacher", shown(answer.get("teacher"))))
    return lines

"""What the commands say and paint: JSON lines on stdout for machines, talk, tables and bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import typer


def print_result(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """A command's result: one JSON line on stdout, or its lines of text."""
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False, default=str))
        return
    for line in lines:
        typer.echo(visible(line))


def print_message(line: str) -> None:
    """A line for people, on stderr."""
    typer.echo(visible(line), err=True)


def visible(text: str) -> str:
    """Control characters as escapes: teacher text can't steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in text
    )


def excluded_phrase(reasons: Mapping[str, int]) -> str:
    """Left-out rows by reason, as an appendix to a sentence."""
    return "".join(f"; left out {count:,} {reason}" for reason, count in sorted(reasons.items()))


def mark_supervised(tokens: Sequence[tuple[str, bool]]) -> str:
    """Tokens as one line, a dot between them; what is supervised is green, or in ⟦⟧ without a terminal."""
    said = []
    for supervised, run in groupby(tokens, key=lambda token: token[1]):
        text = "·".join(visible(piece).replace("\n", "\\n") for piece, _ in run)
        if supervised:
            text = typer.style(text, fg=typer.colors.GREEN) if sys.stdout.isatty() else f"⟦{text}⟧"
        said.append(text)
    return "".join(said)


def print_scorecard(card: Mapping[str, Any]) -> None:
    """The scorecard as a table on stderr."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=f"accuracy on {card['split'].replace('_', ' ')} prompts, 95 % intervals")
    for name, side in (("task", "left"), *((who, "right") for who in ("base", "student", "teacher"))):
        drawn.add_column(name, justify="left" if side == "left" else "right")
    extra = {f"{name} (macro)": split["macro"] for name, split in card["splits"].items()}
    for name, row in {**card["tasks"], "macro": card["macro"], **extra}.items():
        cells = [
            f"{row[w]['accuracy']:.1%} ({row[w]['low']:.0%}–{row[w]['high']:.0%})"
            for w in ("base", "student", "teacher")
        ]
        drawn.add_row(name.replace("_", " "), *cells, style="bold" if name == "macro" else "")
    console = Console(stderr=True)
    console.print(drawn)
    low, high = card["recovery_low"], card["recovery_high"]
    console.print(f"recovery (student / teacher) {card['recovery']:.3f} ({low:.2f}–{high:.2f})")
    base, student = (card.get("loss", {}).get(who) for who in ("base", "student"))
    if student is not None:
        console.print(f"loss on the teacher's answers: base {base:.3f}, student {student:.3f}")


@contextmanager
def progress_bar(title: str, noun: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; without a terminal, a plain line at each fifth of the way."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        fifth = -1

        def plain(done: int, total: int, said: str) -> None:
            nonlocal fifth
            if done * 5 // max(total, 1) != fifth:
                fifth = done * 5 // max(total, 1)
                print_message(f"{title}: {done:,}/{total:,} {noun}, {said}")

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console) as progress:
        progress_bar = progress.add_task(title, total=None, said="")

        def paint(done: int, total: int, said: str) -> None:
            progress.update(progress_bar, completed=done, total=total, said=said)

        yield paint

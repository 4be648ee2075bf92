"""The command line: one typer app, and the one door where errors become lines and exit codes.

Importing this loads neither torch, transformers, pyarrow nor pydantic; commands import their rooms when
they run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from trainer import __version__
from trainer.errors import HarvesterError

EXIT_CODES = """Exit codes: 0 complete, 1 doctor found a fatal fault or the training diverged, 2 usage,
configuration, corpus or student, 5 storage fault, 75 another training holds the output folder,
77 the terms do not permit it, 130/143 interrupted and checkpointed (the same command resumes)."""

app = typer.Typer(
    name="trainer",
    help="Teach a local student what a corpus of teacher answers says, and judge it.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CONFIG = typer.Argument(..., help="train.toml", show_default=False)
AS_JSON = typer.Option(False, "--json", help="Machine lines on stdout, talk on stderr.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trainer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Say the version."
    ),
) -> None:
    """Teach a local student what a corpus of teacher answers says, and judge it."""


@app.command()
def plan(config: Path = CONFIG, as_json: bool = AS_JSON) -> None:
    """Rows, tokens, steps and memory, before a weight is moved.

    Example: trainer plan train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer import plan as room

    told = asdict(room.plan(loaded))
    memory = ", ".join(f"{part} {size / 2**20:.1f}" for part, size in told["memory"].items())
    lines = [
        f"examples {told['examples']:,}, held out {told['held_out']:,}{_excluded(told['excluded'])}",
        f"tokens per epoch {told['tokens_per_epoch']:,}, supervised {told['supervised_per_epoch']:,}",
        f"steps {told['steps']:,} of {told['packs_per_step']} packs, empty seats {told['pack_waste']:.1%}",
        f"parameters: base {told['base_parameters']:,}, adapter {told['adapter_parameters']:,}",
        f"memory in MiB: {memory}",
    ]
    _emit(told, lines, as_json=as_json)


@app.command()
def doctor(config: Path = CONFIG, as_json: bool = AS_JSON) -> None:
    """Show what is supervised, and find label faults before they are learned.

    Example: trainer doctor train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer import doctor as room
    from trainer.errors import FindingsError

    found = room.diagnose(loaded)
    if not as_json:
        for shown in found.shown:
            typer.echo(f"{_visible(shown.prompt_id)}: {_marked(shown.tokens)}")
    _emit(asdict(found), [f"examples {found.examples:,}{_excluded(found.excluded)}"], as_json=as_json)
    if found.findings:
        raise FindingsError(
            "; ".join(found.findings), place=str(config), remedy="repair template, tokenizer or corpus"
        )


@app.command()
def train(
    config: Path = CONFIG,
    processes: int = typer.Option(1, min=1, help="Processes on this machine, one a device (torchrun)."),
    allow_change: bool = typer.Option(False, help="Resume although settings or corpus changed."),
    as_json: bool = AS_JSON,
) -> None:
    """Train the adapter; the same command resumes where it stopped.

    Example: trainer train train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    if processes > 1:
        from trainer import fleet

        raise typer.Exit(fleet.launch(config, processes, allow_change=allow_change))
    _talk("reading corpus and student")
    from trainer import dataset

    rows = dataset.read(loaded)  # what the corpus lacks is said before torch is loaded
    from trainer import train as room

    with _bar("train", "steps") as update:
        done = room.train(
            loaded,
            lambda log: update(
                log.step,
                log.steps,
                f"epoch {log.epoch + 1}, loss {log.loss:.3f}, {log.tokens_per_s:,.0f} tokens/s",
            ),
            rows=rows,
            allow_change=allow_change,
        )
    loss = f", loss {done.loss:.3f}" if done.loss is not None else ""
    now = (
        f"{done.steps_now:,} steps now ({done.tokens_per_s:,.0f} tokens/s)"
        if done.steps_now
        else "complete already"
    )
    if os.environ.get("RANK", "0") != "0":
        return  # one process of a fleet talks
    lines = [
        *done.notes,
        f"examples {done.examples:,}{_excluded(done.excluded)}; {done.steps:,} steps, {now}{loss}",
        f"adapter in {done.adapter}",
    ]
    _emit(asdict(done), lines, as_json=as_json)


@app.command()
def evaluate(config: Path = CONFIG, as_json: bool = AS_JSON) -> None:
    """Let base and student answer the held-out prompts; write scorecard.json beside the adapter.

    Example: trainer evaluate train.toml
    """
    from trainer import config as settings

    loaded = settings.load(config)
    _talk("reading corpus and student")
    from trainer import evaluate as room

    with _bar("score", "prompts") as update:
        offset = {"base": 0, "student": 1}
        card = room.evaluate(
            loaded, lambda who, total, done: update(offset[who] * total + done, 2 * total, who)
        )
    where = str(loaded.out_path / "scorecard.json")
    _table(card)
    _emit({**card, "scorecard": where}, [f"scorecard in {where}"], as_json=as_json)


@app.command()
def export(
    config: Path = CONFIG,
    out: Path = typer.Argument(..., help="Folder for the merged student.", show_default=False),
    as_json: bool = AS_JSON,
) -> None:
    """Merge the adapter into the base in fp32 and prove the result equal.

    Example: trainer export train.toml merged/
    """
    from trainer import config as settings

    loaded = settings.load(config)
    from trainer import export as room

    parity = room.merge(loaded, out)
    said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in parity.items())
    _emit({**parity, "merged": str(out)}, [f"merged student in {out}: {said}"], as_json=as_json)


def main() -> None:
    """Run the app; every error of ours ends as one clear message and its documented exit code."""
    # OpenMP reads this when torch loads. Threads that spin while they wait fight any other busy process for
    # the cores: measured 500 tokens/s beside a second two-thread process, 9,000 with threads that sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except HarvesterError as error:
        _talk(f"error[{error.code}]: {error.message}")
        if error.place:
            _talk(f"  where   {error.place}")
        if error.remedy:
            _talk(f"  remedy  {error.remedy}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _emit(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False, default=str))
        return
    for line in lines:
        typer.echo(_visible(line))


def _talk(line: str) -> None:
    typer.echo(_visible(line), err=True)


def _visible(text: str) -> str:
    """Control characters as escapes: teacher text can't steer a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in text
    )


def _excluded(reasons: Mapping[str, int]) -> str:
    return "".join(f"; left out {count:,} {reason}" for reason, count in sorted(reasons.items()))


def _marked(tokens: Sequence[tuple[str, bool]]) -> str:
    """Tokens as one line, a dot between them; what is supervised is green, or in ⟦⟧ without a terminal."""
    said = []
    for supervised, run in groupby(tokens, key=lambda token: token[1]):
        text = "·".join(_visible(piece).replace("\n", "\\n") for piece, _ in run)
        if supervised:
            text = typer.style(text, fg=typer.colors.GREEN) if sys.stdout.isatty() else f"⟦{text}⟧"
        said.append(text)
    return "".join(said)


def _table(card: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"accuracy on {card['split'].replace('_', ' ')} prompts, 95 % intervals")
    for name, side in (("task", "left"), *((who, "right") for who in ("base", "student", "teacher"))):
        table.add_column(name, justify="left" if side == "left" else "right")
    extra = {f"{name} (macro)": split["macro"] for name, split in card["splits"].items()}
    for name, row in {**card["tasks"], "macro": card["macro"], **extra}.items():
        cells = [
            f"{row[w]['accuracy']:.1%} ({row[w]['low']:.0%}–{row[w]['high']:.0%})"
            for w in ("base", "student", "teacher")
        ]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "macro" else "")
    console = Console(stderr=True)
    console.print(table)
    low, high = card["recovery_low"], card["recovery_high"]
    console.print(f"recovery (student / teacher) {card['recovery']:.3f} ({low:.2f}–{high:.2f})")


@contextmanager
def _bar(title: str, noun: str) -> Iterator[Callable[[int, int, str], None]]:
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
                _talk(f"{title}: {done:,}/{total:,} {noun}, {said}")

        yield plain
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console) as progress:
        bar = progress.add_task(title, total=None, said="")

        def paint(done: int, total: int, said: str) -> None:
            progress.update(bar, completed=done, total=total, said=said)

        yield paint

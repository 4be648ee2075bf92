"""The command line: one typer app, and the one door where errors become lines and exit codes.

Importing this loads neither httpx, openai, pyarrow nor torch; commands import their rooms when they run.
"""

from __future__ import annotations

import io
import os
import sys

import typer

from harvester import __version__
from harvester.cli import harvest, mock, reference, report, status, store, terms
from harvester.errors import HarvesterError

EXIT_CODES = """Exit codes: 0 complete, 1 verify/--check found something, 2 usage or configuration,
3 complete but more rows failed than max_failed, 4 the teacher refuses, 5 storage fault,
10 stopped at a limit you set (resumable), 75 another process holds the store,
77 the terms do not permit it, 130/143 interrupted and drained (resumable)."""

app = typer.Typer(
    name="harvester",
    help="Ask a teacher, keep every paid answer, seal them into Parquet.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from harvester.cli.console import emit

        emit({}, [f"harvester {__version__}"], as_json=False)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Say the version."
    ),
) -> None:
    """Ask a teacher, keep every paid answer, seal them into Parquet."""


for room in (harvest, status, report, store, terms, reference, mock):
    room.register(app)


def main() -> None:
    """Run the app; every HarvesterError ends as one clear message and its documented exit code."""
    _standard_streams()
    try:
        app()
    except HarvesterError as error:
        _say(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is not None:  # no stream of ours
            raise
        from harvester.cli.console import lost

        told = lost(error)  # of a help text: results pass through `emit`
        if told is not None:
            _say(told)
        sys.exit(told.exit_code if told else 0)


def _standard_streams() -> None:
    """What can't be shown is escaped, not fatal; a stream closed by the caller is never a store's file."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(error: HarvesterError) -> None:
    from harvester.cli.console import talk
    from harvester.cli.explain import remedy_of

    talk(f"error[{error.code}]: {error.message}")
    if error.place:
        talk(f"  where   {error.place}")
    talk(f"  remedy  {error.remedy or remedy_of(error.code)}")

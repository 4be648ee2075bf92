"""Commands that need no key, no GPU and no network: `mock-teacher`, `demo`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import typer

from harvester.cli.commands import REFERENCE, HarvesterApp
from harvester.cli.console import JSON, emit, message
from harvester.errors import UsageError
from harvester.system.command_line import verb_command

MOCK_TEACHER = "harvester mock-teacher"
_PREFIX = verb_command.variable_name("HARVESTER", "mock-teacher")
_YES, _NO = frozenset({"1", "true", "t", "yes", "y", "on"}), frozenset({"0", "false", "f", "no", "n", "off"})


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(
        "mock-teacher",
        epilog="Example: harvester mock-teacher --port 8000 --rpm 600 --latency 0.2",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
        add_help_option=False,
        section=REFERENCE,
    )(mock_teacher)
    app.command(epilog="Example: harvester demo data/demo", section=REFERENCE)(demo)


def mock_teacher(context: typer.Context) -> None:
    """Start the mock teacher: a local HTTP server with limits, faults and a billing ledger.

    `harvester mock-teacher --help` lists its options.
    """
    from harvester.mock_teacher.__main__ import main

    raise typer.Exit(main([*_arguments_of_variables(context.args), *context.args], MOCK_TEACHER))


def mock_variables() -> dict[str, argparse.Action]:
    """Return the options of the mock teacher by the names of their variables."""
    from harvester.mock_teacher.__main__ import parser

    options = [action for action in parser(MOCK_TEACHER)._actions if action.option_strings]
    return {
        verb_command.variable_name(_PREFIX, _flag(option)): option
        for option in options
        if option.dest != "help"
    }


def _flag(option: argparse.Action) -> str:
    return max(option.option_strings, key=len)


def _arguments_of_variables(given: Sequence[str]) -> list[str]:
    """Return the options that variables set and the command line does not, as arguments.

    Raises:
        UsageError: a wrong value; names the variable.
    """
    from harvester.mock_teacher.__main__ import parser

    flags, known = parser(MOCK_TEACHER), mock_variables()
    flags.exit_on_error = False
    for name in verb_command.unknown_variables(_PREFIX, known):
        message(verb_command.unknown_variable_text(name, MOCK_TEACHER))
    words = [word.partition("=")[0] for word in given if word.startswith("--")]
    arguments = []
    for name, option in known.items():
        value, flag = os.environ.get(name, ""), _flag(option)
        if not value or any(len(word) > 2 and flag.startswith(word) for word in words):
            continue
        if option.nargs == 0:
            if value.lower() not in _YES | _NO:
                raise UsageError(f"{value!r} is neither true nor false", place=name, remedy="as in 1 or 0")
            arguments += [flag] if value.lower() in _YES else []
            continue
        try:
            flags.parse_args([f"{flag}={value}"])
        except argparse.ArgumentError as error:
            raise UsageError(error.message, place=f"{flag} (environment variable {name})") from None
        arguments.append(f"{flag}={value}")
    return arguments


def demo(
    folder: Path | None = typer.Argument(
        None,
        metavar="FOLDER",
        help="Folder to work in; default: data/demo of the checkout, else distillation-demo.",
    ),
    as_json: bool = JSON,
) -> None:
    """Run everything once, offline: harvest the mock teacher, train a student, score it, write a report."""
    from harvester.cli.demo import default_folder, run_demo, summary_lines

    work_folder = folder or default_folder()
    summary = run_demo(work_folder)
    emit(summary, summary_lines(work_folder, summary), as_json=as_json)

"""Build the command line, and turn every error into a message and an exit code.

Commands import what they need when they run, so that `--help` loads neither httpx, openai, pyarrow nor torch.
"""

from __future__ import annotations

import io
import os
import sys

from harvester.cli import (
    attach,
    fleet,
    harvest,
    import_prompts,
    judge,
    mock,
    publish,
    reference,
    report,
    status,
    store,
    terms,
)
from harvester.cli.commands import HarvesterApp
from harvester.cli.console import emit, message, stdout_error
from harvester.errors import HarvesterError, StoreError
from harvester.system import collection
from harvester.system.command_line.unused_imports import skip_unused_imports
from harvester.system.command_line.version import version_option
from harvester.system.open_files import SHORTAGE

EXIT_CODES = """Exit codes: 0 complete; 1 verify or --check found a problem; 2 wrong usage or configuration,
or a package that is not installed; 3 complete, but more rows failed than max_failed, or more answers are
unusable than max_unusable; 4 the teacher refuses (key, quota, model, policy); 5 storage error; 10 stopped at
a limit, resumable; 75 another process uses the store; 77 the terms do not permit it; 130 or 143 interrupted
by a signal, resumable."""

app = HarvesterApp(
    name="harvester",
    help="Ask a teacher many prompts, keep every paid answer, write them to Parquet files.",
    epilog=EXIT_CODES,
)


@app.callback()
def _root(
    version: bool = version_option("harvester", lambda line: emit({}, [line], as_json=False)),
) -> None:
    """Ask a teacher many prompts, keep every paid answer, write them to Parquet files."""


for commands in (
    harvest,
    fleet,
    attach,
    import_prompts,
    judge,
    status,
    report,
    store,
    publish,
    terms,
    reference,
    mock,
):
    commands.register(app)


def main() -> None:
    """Run the app. Every HarvesterError becomes one message on stderr and its exit code."""
    if sys.argv[1:2] in (
        ["run"],
        ["judge"],
    ):  # other commands import functions of users, which may need pandas
        skip_unused_imports()
        collection.put_off()
    _standard_streams()
    try:
        app(prog_name="harvester")
    except HarvesterError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        message("interrupted")
        sys.exit(130)
    except RuntimeError as error:  # of pathlib, up to Python 3.12
        if not str(error).startswith("Symlink loop"):
            raise
        _print_error(StoreError("a symbolic link leads to itself", place=str(error), remedy="mend the link"))
        sys.exit(StoreError.exit_code)
    except OSError as error:
        if error.filename is not None:  # a file, not stdout
            remedy = "raise the limit of open files: `ulimit -n 1024`" if error.errno in SHORTAGE else ""
            message_text = str(error.strerror or error).lower()
            _print_error(StoreError(message_text, place=str(error.filename), remedy=remedy))
            sys.exit(StoreError.exit_code)
        # A help text could not be printed; results go through `emit`, which raises a StoreError.
        failure = stdout_error(error)
        if failure is not None:
            _print_error(failure)
        sys.exit(failure.exit_code if failure else 0)


def _standard_streams() -> None:
    """Open closed standard streams on /dev/null, and escape characters that a stream can't encode.

    Without the first, a file of the store could get the number of a closed stream, and receive its output.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123 - for life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_error(error: HarvesterError) -> None:
    from harvester.system.command_line.remedies import error_lines

    for line in error_lines(error):
        message(line)

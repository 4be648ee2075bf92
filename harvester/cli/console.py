"""Shared options of the commands, and their output: results on stdout, messages and progress on stderr.

Results are text for people, or one JSON line with `--json`. stderr holds lines for people, or with
`log_as_json` one JSON record a line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer

from harvester.errors import StoreError
from harvester.library import readable_store, store_folder
from harvester.observe.metrics import PROGRESS_FIELDS
from harvester.system.command_line.displays import can_draw
from harvester.system.command_line.wrapped import for_terminal
from harvester.system.objects.url import require_path_or_url
from harvester.system.safe_text import one_line

# Seconds between two progress lines where stderr is no terminal.
PLAIN_EVERY_S = 30.0


Status = Mapping[str, Any]

# Where a command that reads a store looks for further terms.
TERMS_BESIDE = typer.Option(
    None,
    help="Folder of a harvest.toml whose terms/ and permissions/ count too.",
    exists=True,
    file_okay=False,
)
# The `--json` option of every command.
JSON = typer.Option(False, "--json", help="Print the result as one line of JSON.")


def _path_or_url(name: str) -> Path:
    """Return a path; a URL is checked before, for `Path` takes a slash away from it."""
    require_path_or_url(name)
    return Path(name)


def _store_argument(callback: Callable[[Path], Path]) -> Any:
    return typer.Argument(
        ...,
        metavar="STORE",
        help="Folder of the store, or the harvest.toml that names it.",
        parser=_path_or_url,
        callback=callback,
        show_default=False,
    )


# The STORE argument of every command that reads or changes a store, or talks to its run.
STORE = _store_argument(store_folder)
# The STORE argument of commands that only read it, which may be a URL too.
READ_STORE = _store_argument(readable_store)


def emit(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print the result of a command: `data` as one JSON line, or `lines` of text.

    Raises:
        StoreError: stdout can't be written, as on a full disk. A reader that went away is no error.
    """
    output = [json.dumps(data, default=str)] if as_json else for_terminal(map(one_line, lines), sys.stdout)
    write_stdout("".join(f"{line}\n" for line in output))


def write_stdout(text: str) -> None:
    """Print `text` unchanged; raises as `emit` does."""
    try:
        print(text, end="", flush=True)  # noqa: T201
    except OSError as error:
        if (failure := stdout_error(error)) is not None:
            raise failure from None


def stdout_error(error: OSError) -> StoreError | None:
    """Return the error to report for a failed write to stdout, None if its reader went away.

    Whatever is printed afterwards is discarded.
    """
    with open(os.devnull, "wb") as devnull:  # noqa: PTH123 - takes what is still buffered
        os.dup2(devnull.fileno(), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return None
    return StoreError(
        f"stdout can't be written: {error.strerror}",
        place="stdout",
        remedy="the command did its work, only its result is not shown; send the output elsewhere",
    )


def message(line: str) -> None:
    """Print a message on stderr: a line of text, or a JSON record after `log_as_json`."""
    if _logging:
        _write(json.dumps({"at": _now(), "event": "message", "message": line}))
        return
    for part in for_terminal([one_line(line)], sys.stderr):
        _write(part)


_logging = False


def log_as_json() -> None:
    """Print JSON records instead of text on stderr from now on, for the whole process."""
    global _logging
    _logging = True


def _write(line: str) -> None:
    try:
        sys.stderr.write(f"{line}\n")  # `print` writes the line end apart, and another thread between
        sys.stderr.flush()
    except OSError:  # stderr was closed: the run goes on without it
        sys.stderr = open(  # noqa: SIM115, PTH123 - stays open until the process ends
            "/dev/null", "w", encoding="utf-8"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def progress_display(total: int, title: str, *, at_once: bool = False) -> Iterator[Callable[[Status], None]]:
    """Show progress on stderr during the block; call the yielded function with each status.

    On a terminal it draws two bars. Elsewhere it prints a line (or a JSON record) every 30 s, at the end, and
    at once when something delays the first request.

    Args:
        at_once: also print the first status.
    """
    if not _logging and can_draw():
        from harvester.observe import progress

        with progress.live(title) as update:
            yield update
        return
    lines = _ProgressLines(total, title, at_once=at_once)
    try:
        yield lines.update
    finally:
        lines.close()


class _ProgressLines:
    """Progress as plain lines or JSON records."""

    def __init__(self, total: int, title: str, *, at_once: bool = False) -> None:
        from harvester.observe.status_line import status_line  # later, files may be short

        self._text_of = status_line
        self._total = total
        self._title = title
        self._status: Status = {}
        self._printed_at = time.monotonic() - (PLAIN_EVERY_S if at_once else 0.0)
        self._printed_state = ""
        self._delay_reported = False

    def update(self, status: Status) -> None:
        """Take a new status, and print it if a line is due."""
        self._status = status
        delayed = bool(status.get("waiting")) and not status.get("requests_sent")
        newly_delayed = delayed and not self._delay_reported
        self._delay_reported = self._delay_reported or delayed
        changed = _logging and status.get("state") != self._printed_state
        if newly_delayed or changed or time.monotonic() - self._printed_at >= PLAIN_EVERY_S:
            self._print()

    def close(self) -> None:
        """Print the last status."""
        if self._status:
            self._print()

    def _print(self) -> None:
        status = self._status
        self._printed_at, self._printed_state = time.monotonic(), str(status.get("state", ""))
        if _logging:
            fields = {name: status.get(name) for name in PROGRESS_FIELDS}
            _write(json.dumps({"at": _now(), "event": "progress", **fields}))
        else:
            _write(one_line(f"{self._title}: {self._text_of(status, self._total)}"))

"""Hold the version of both commands, and build their option `--version`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.1.0"
VERSION = __version__


def version_option(command: str, print_line: Callable[[str], None]) -> Any:
    """Return a typer option that prints name and version of `command`, and ends it.

    Args:
        print_line: prints a line on stdout.
    """
    import typer

    def show(wanted: bool) -> None:
        if wanted:
            print_line(f"{command} {VERSION}")
            raise typer.Exit

    return typer.Option(False, "--version", callback=show, is_eager=True, help="Print the version.")

"""Find out whether bars can be drawn, and on what: a terminal, which may close, or a notebook."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from typing import IO, TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console


def in_notebook() -> bool:
    """Whether the process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


def can_draw() -> bool:
    """Whether rich can draw bars: stderr is a terminal, or a notebook has ipywidgets."""
    if in_notebook():
        return importlib.util.find_spec("ipywidgets") is not None
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def drawing_console() -> Console:
    """Return the console to draw on: the notebook's, or stderr, whose terminal may close."""
    from rich.console import Console

    stream = None if in_notebook() else cast(IO[str], TolerantStream(sys.stderr))
    return Console(file=stream, markup=False, highlight=False)


class TolerantStream:
    """A terminal stream whose write errors are ignored: a closed terminal must not end a run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        """Write `text`; ignore errors."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; ignore errors."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return True: the display is used on terminals only."""
        return True

    def fileno(self) -> int:
        """Return the file descriptor, from which rich reads the size of the terminal."""
        return self._stream.fileno()

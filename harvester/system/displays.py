"""Find out whether bars can be drawn: on a terminal, or in a notebook."""

from __future__ import annotations

import importlib.util
import os
import sys


def in_notebook() -> bool:
    """Whether the process is the kernel of a notebook."""
    from rich.console import Console

    return Console().is_jupyter


def can_draw() -> bool:
    """Whether rich can draw bars: stderr is a terminal, or a notebook has ipywidgets."""
    if in_notebook():
        return importlib.util.find_spec("ipywidgets") is not None
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

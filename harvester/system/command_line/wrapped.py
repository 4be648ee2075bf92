"""Wrap lines for a terminal: at spaces, with the rest under the last column of the line."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable
from typing import TextIO

# A narrower terminal gets lines for this width: there is no room for words beside an indent.
NARROWEST = 40
# The rest of a line is indented by at most this share of the width.
DEEPEST = 0.5


def for_terminal(lines: Iterable[str], stream: TextIO) -> list[str]:
    """Return lines wrapped to the terminal of `stream`; unchanged where it is none, as others read them."""
    if not stream.isatty():
        return list(lines)
    width = shutil.get_terminal_size().columns
    return [part for line in lines for part in wrapped(line, width)]


def wrapped(line: str, width: int) -> list[str]:
    """Return a line as lines of at most `width` characters; a longer word stays whole.

    The rest stands where the last column begins that follows two spaces: labels and tables stay readable.
    """
    width = max(width, NARROWEST)
    if len(line) <= width:
        return [line]
    begin = len(line) - len(line.lstrip(" "))
    columns = [match.end() for match in re.finditer(r"(?<=\S) {2,}", line)]
    indent = max([column for column in columns if column <= width * DEEPEST], default=0)
    head = line[:indent] or " " * begin
    parts = textwrap.wrap(
        line[len(head) :],
        width,
        initial_indent=head,
        subsequent_indent=" " * (indent or begin + 2),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return parts or [line]

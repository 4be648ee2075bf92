"""Quote the words of a command that a message tells the user to type."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from harvester.system.safe_text import one_line


def shell_line(*words: str | Path) -> str:
    """Return a command of these words."""
    return " ".join(map(shell_word, words))


def shell_word(word: str | Path) -> str:
    """Quote a word, so that a shell passes it on as it is.

    A path that begins with a dash gets `./` before it, so that no program takes it for an option. A word with
    line breaks, invisible characters or bytes that are no UTF-8, which a terminal can't show, is written as
    `$'...'` (bash, zsh, ksh, POSIX of 2024) with its bytes in octal.
    """
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if one_line(text) == text and "\t" not in text:
        return shlex.quote(text)
    return f"$'{''.join(map(_octal_if_needed, text))}'"


def _octal_if_needed(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character != "\t" and one_line(character) == character:
        return character
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))

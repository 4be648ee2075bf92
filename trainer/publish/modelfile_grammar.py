"""Read a Modelfile by Ollama's grammar, to prove that Ollama reads what was meant.

A Modelfile is a sequence of instructions, each `NAME value`; names are not case sensitive, `#` begins a
comment line, PARAMETER and MESSAGE take one more word before the value. A value ends with its line, unless it
begins with `"` or three of them: then it ends with the first line that ends in the same quotes. Characters
that are not printable are dropped, but for spaces, tabs and the line ends inside quotes.

Sources: Ollama's docs/modelfile.mdx and the state machine of its parser/parser.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_NAMES = frozenset(
    ("from", "license", "template", "system", "adapter", "renderer", "parser", "message", "requires")
)
_START = re.compile(r"[\s]*(?:#[^\r\n]*(?:[\r\n]|$)\s*)*")
_NAME = re.compile(r"([A-Za-z]+)[ \t]")
_PARAMETER = re.compile(r"[ \t]*([A-Za-z0-9_]+)[ \t]")
_ROLE = re.compile(r"[ \t]*(system|user|assistant)[ \t]")


def parse(text: str) -> list[tuple[str, str]]:
    """Return the instructions of a Modelfile as (name, value).

    A parameter has its own name (`stop`), a message the name `message` and a value with its role.

    Raises:
        ValueError: Ollama would refuse it; says in which line.
    """
    instructions = list(_instructions(text))
    if not any(name == "from" for name, _ in instructions):
        raise ValueError("no FROM line")
    return instructions


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while True:
        start = _START.match(text, at)
        at = start.end() if start else at
        if at >= len(text):
            return
        match = _NAME.match(text, at)
        name = match[1].lower() if match else ""
        words = {"parameter": _PARAMETER, "message": _ROLE}
        if match is None or (name not in _NAMES and name not in words):
            raise ValueError(f"line {_line(text, at)}: not an instruction")
        at, role = match.end(), ""
        if name in words:
            word = words[name].match(text, at)
            if word is None:
                raise ValueError(f"line {_line(text, at)}: {name.upper()} lacks its name")
            at = word.end()
            name, role = (word[1], "") if name == "parameter" else (name, f"{word[1]}: ")
        value, at = _value(text, at)
        yield name, role + value


def _value(text: str, at: int) -> tuple[str, int]:
    """Return a value that begins at a position, and the position after it."""
    for end in [*(match.start() for match in re.finditer(r"[\r\n]", text[at:])), len(text) - at]:
        value = _unquoted(text[at : at + end].strip())
        if value is not None:
            return "".join(c for c in value if c.isprintable() or c in "\t\r\n"), at + end
    raise ValueError(f"line {_line(text, at)}: the quotes are not closed")


def _unquoted(text: str) -> str | None:
    """Return a value without its quotes; None while they are open."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            is_closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if is_closed else None
    return text


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1

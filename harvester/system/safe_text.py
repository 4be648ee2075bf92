"""Escape control and formatting characters in foreign text, so that it can't alter a terminal or a log."""

from __future__ import annotations

import unicodedata

# Control, format (bidirectional overrides, tags), surrogate, private, unassigned, line and paragraph ends.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_KEPT = frozenset("\n\t\u200c\u200d")  # the joiners: Persian and emoji need them, and they reorder nothing


def visible(text: str) -> str:
    """Escape invisible and reordering characters; keep line breaks and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _ESCAPED else _escape(c) for c in text)


def one_line(text: str) -> str:
    """Escape as `visible` does, and line breaks too, so that one record stays one line."""
    return visible(text).replace("\n", "\\n")


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")

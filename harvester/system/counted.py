"""Write a number with its noun."""

from __future__ import annotations

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 batch" or "2,000 batches". The plural is the noun with an s unless it is given."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def first_few(items: Sequence[str], most: int = 5, separator: str = "; ") -> str:
    """Return the first of these in a line, and how many more there are."""
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])

"""Choose items of a long list at equal distances. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items at equal distances, so that no part of the list is left out."""
    if count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]

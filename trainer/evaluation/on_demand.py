"""Compute or read the values of a sequence each time that they are asked for, so that none is held."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
S = TypeVar("S")


class OnDemand(Sequence[T]):
    """Values by their place.

    Args:
        value_of: returns the value of a place.
    """

    def __init__(self, count: int, value_of: Callable[[int], T]) -> None:
        self._count = count
        self._value_of = value_of

    def __len__(self) -> int:
        """Return their number."""
        return self._count

    def __getitem__(self, place: Any) -> Any:
        """Return one value, or the values of a slice."""
        if isinstance(place, slice):
            places = range(self._count)[place]
            return OnDemand(len(places), lambda at: self._value_of(places[at]))
        return self._value_of(range(self._count)[place])


def some(items: Sequence[T], places: Sequence[int] | NDArray[np.integer[Any]]) -> Sequence[T]:
    """Return the items of some places."""
    return OnDemand(len(places), lambda at: items[int(places[at])])


def mapped(items: Sequence[S], function: Callable[[S], T]) -> Sequence[T]:
    """Return what a function makes of each item."""
    return OnDemand(len(items), lambda at: function(items[at]))


def joined(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    """Return the items of some sequences, one after the other."""
    firsts = [0, *accumulate(map(len, parts))]

    def item(at: int) -> T:
        part = bisect_right(firsts, at) - 1
        return parts[part][at - firsts[part]]

    return OnDemand(firsts[-1], item)

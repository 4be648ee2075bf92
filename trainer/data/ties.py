"""Find the rows that are equal to a neighbour in a sorted order. Loads no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def places_of_ties(is_tie: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the places of all items of a sorted list that are equal to the one before or after, rising.

    Args:
        is_tie: [items - 1] whether an item is equal to the next one.
    """
    tied = np.zeros(len(is_tie) + 1, dtype=bool)
    tied[:-1] |= is_tie
    tied[1:] |= is_tie
    return np.flatnonzero(tied)

"""Test the choice of items at equal distances, and where a sorted list has equal neighbours."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from trainer.data.spread import spread
from trainer.data.ties import places_of_ties


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(0, []), (1, [0]), (3, [0, 3, 6]), (9, [*range(9)]), (10, [*range(10)]), (11, [*range(10)])],
)
def test_items_are_chosen_at_equal_distances(count: int, chosen: list[int]) -> None:
    assert spread(range(10), count) == chosen


@pytest.mark.parametrize(
    ("items", "places"),
    [("abc", []), ("aab", [0, 1]), ("abbbc", [1, 2, 3]), ("aabcc", [0, 1, 3, 4]), ("a", [])],
)
def test_equal_neighbours_are_found(items: str, places: list[int]) -> None:
    is_tie = np.array([one == next_one for one, next_one in pairwise(items)], dtype=bool)
    assert places_of_ties(is_tie).tolist() == places

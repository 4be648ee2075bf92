"""Group examples into packs of at most a token budget, by best-fit decreasing. No torch.

Best-fit decreasing is within 11/9 of the optimum (Johnson 1974); on rows of mixed length it leaves
far less than a percent. Examples far smaller than the budget are taken in random order instead of by
length: they fill any gap, and sorting them would seat only like with like, so that every step would
see one kind of prompt.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

MAX_DOCUMENTS = 4096  # attention kernels index documents with 32 bits times heads; 8k tiny ones crashed some
SMALL = 16  # an example below budget / SMALL counts as small


@dataclass(frozen=True, slots=True)
class Packing:
    """Packs of example numbers.

    Attributes:
        packs: every example number exactly once.
        budget: tokens a pack may hold.
        tokens: tokens of all examples.
    """

    packs: tuple[tuple[int, ...], ...]
    budget: int
    tokens: int

    @property
    def waste(self) -> float:
        """Unused share of the token budget, in [0, 1). It costs nothing where packs are not padded."""
        seats = len(self.packs) * self.budget
        return 1 - self.tokens / seats if seats else 0.0


def pack(
    lengths: Sequence[int], budget: int, *, seed: int = 0, max_documents: int = MAX_DOCUMENTS
) -> Packing:
    """Assign every example to a pack; the result depends on the arguments only.

    Args:
        lengths: tokens of each example, each from 1 to `budget`.
        budget: tokens a pack may hold.
        seed: order among equals and among small examples.
        max_documents: examples a pack may hold.

    Raises:
        ValueError: an example is empty or longer than the budget: nothing is dropped or cut here.
    """
    if any(not 0 < length <= budget for length in lengths):
        raise ValueError(f"every length must lie in 1..{budget}")
    small = budget // SMALL
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - reproducible order, nothing secret
    order.sort(key=lambda i: -max(lengths[i], small))  # stable: equals stay shuffled

    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack number), sorted, of packs that can take more
    for i in order:
        at = bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            left, number = budget, len(packs)
            packs.append([])
        packs[number].append(i)
        left -= lengths[i]
        if left > 0 and len(packs[number]) < max_documents:
            insort(room, (left, number))
    return Packing(tuple(map(tuple, packs)), budget, sum(lengths))

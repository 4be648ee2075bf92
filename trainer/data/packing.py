"""Group examples into packs of at most a token budget, by best-fit decreasing. Loads no torch.

Best-fit decreasing needs at most 11/9 of the optimal number of packs (Johnson 1974); with rows of mixed
length it wastes far less than a percent. Examples far smaller than the budget are taken in random order
instead of by length: they fill any gap, and sorting them would put examples of one length, and so prompts
of one kind, into the same step.

Lengths, numbers and packs are arrays of 4 bytes an example: ten million examples take some 300 MB while they
are packed.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int32]

# Attention kernels index (document, head) pairs with few bits; 8,192 tiny documents crashed some of them.
MAX_DOCUMENTS = 4096

# FlashAttention pads each document by up to 128 tokens in buffers that 32-bit indices address.
PADDING_OF_DOCUMENT = 128
MAX_INDEX = 2**31 - 1

# An example shorter than budget / SMALL counts as small.
SMALL = 16

# Examples that exist as Python integers at a time.
_AT_ONCE = 1 << 16


def max_documents(budget: int, channels: int) -> int:
    """Return the documents that a pack may hold so that attention's 32-bit indices suffice.

    (tokens + 128 documents) * channels must stay below 2^31, with channels = heads * head size.

    Args:
        budget: tokens of a pack.
        channels: values of a token's query in one layer; 0: unknown.
    """
    if not channels:
        return MAX_DOCUMENTS
    fitting = (MAX_INDEX // channels - budget) // PADDING_OF_DOCUMENT
    return max(1, min(MAX_DOCUMENTS, fitting))


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Packs of example numbers.

    Attributes:
        items: [examples] int32, the example numbers pack by pack; each number appears exactly once.
        bounds: [packs + 1] int64, where each pack begins in `items`, and its end.
        budget: most tokens of a pack.
        tokens: tokens of all examples.
    """

    items: Numbers
    bounds: npt.NDArray[np.int64]
    budget: int
    tokens: int

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.bounds) - 1

    def pack(self, number: int) -> tuple[int, ...]:
        """Return the example numbers of one pack."""
        return tuple(self.items[self.bounds[number] : self.bounds[number + 1]].tolist())

    @property
    def packs(self) -> tuple[tuple[int, ...], ...]:
        """The example numbers of each pack, as Python integers: for some thousand examples."""
        return tuple(self.pack(number) for number in range(len(self)))

    @property
    def waste(self) -> float:
        """Unused share of the token budget, in [0, 1). It costs nothing if packs are not padded."""
        capacity = len(self) * self.budget
        return 1 - self.tokens / capacity if capacity else 0.0


def pack(
    lengths: Sequence[int] | Numbers, budget: int, *, seed: int = 0, max_documents: int = MAX_DOCUMENTS
) -> Packing:
    """Assign every example to a pack; the result depends on the arguments only.

    Args:
        lengths: tokens of each example, from 1 to `budget`.
        budget: most tokens of a pack.
        seed: decides the order among equally long and among small examples.
        max_documents: most examples of a pack.

    Raises:
        ValueError: an example is empty or longer than the budget; none is dropped or cut.
    """
    given = np.asarray(lengths)
    if len(given) and not 0 < given.min() <= given.max() <= budget:
        raise ValueError(f"every length must lie in 1..{budget}")
    sizes = given.astype(np.int32, copy=False)
    order = shuffled(len(sizes), seed)
    # Stable: equals stay shuffled.
    order = order[np.argsort(-np.maximum(sizes[order], budget // SMALL), kind="stable")]
    pack_of, packs = _best_fit(sizes, order, budget, max_documents)
    bounds = np.zeros(packs + 1, dtype=np.int64)
    np.cumsum(np.bincount(pack_of, minlength=packs), out=bounds[1:])
    items = order[np.argsort(pack_of, kind="stable")]
    return Packing(items, bounds, budget, int(sizes.sum(dtype=np.int64)))


def shuffled(count: int, seed: int) -> Numbers:
    """Return the numbers below `count` in random order, as `random.Random(seed).shuffle` orders a list."""
    numbers = array("i", range(count))
    random.Random(seed).shuffle(numbers)  # noqa: S311 - reproducible order, nothing secret
    return np.frombuffer(numbers, dtype=np.int32)


def _best_fit(sizes: Numbers, order: Numbers, budget: int, max_documents: int) -> tuple[Numbers, int]:
    """Put examples one after the other into the open pack with the least sufficient space.

    Of several such packs the oldest is taken.

    Returns:
        [examples] the pack of each example, in `order`; and the number of packs.
    """
    pack_of = np.empty(len(order), dtype=np.int32)
    shortest = int(sizes.min(initial=budget))
    documents = array("i")
    # The distinct free spaces of open packs, sorted, and the packs of each as a heap.
    spaces: list[int] = []
    packs_by_space: dict[int, list[int]] = {}
    for begin in range(0, len(order), _AT_ONCE):
        assigned: list[int] = []
        for length in sizes[order[begin : begin + _AT_ONCE]].tolist():
            position = bisect_left(spaces, length)
            if position < len(spaces):
                space = spaces[position]
                open_packs = packs_by_space[space]
                number = heappop(open_packs)
                if not open_packs:
                    del spaces[position], packs_by_space[space]
            else:
                space, number = budget, len(documents)
                documents.append(0)
            assigned.append(number)
            documents[number] += 1
            space -= length
            # A pack with less space than the shortest example takes no more.
            if space >= shortest and documents[number] < max_documents:
                if space not in packs_by_space:
                    packs_by_space[space] = []
                    spaces.insert(bisect_left(spaces, space), space)
                heappush(packs_by_space[space], number)
        pack_of[begin : begin + len(assigned)] = assigned
    return pack_of, len(documents)

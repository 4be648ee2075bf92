"""Define what a filter of `harvester curate` is.

A filter is a function from a Sample to None (keep), a Drop with a reason, or another Sample that takes the
place of the row (masking). A filter with state is built anew for each curation. No filter reads a clock, a
file or a random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from harvester.store.shards.schema import Sample


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a sample is dropped; `reason` is a short stable name that is counted, `detail` is for people."""

    reason: str
    detail: str = ""


# Returns None to keep the sample, or a sample to keep in its place.
Filter = Callable[[Sample], Drop | Sample | None]


@runtime_checkable
class Survey(Protocol):
    """A filter that looks at all rows before it decides about the first."""

    def observe(self, sample: Sample) -> None:
        """Take a row into account."""

    def __call__(self, sample: Sample) -> Drop | Sample | None:
        """Decide about a row."""


def chain(filters: Sequence[Filter]) -> Filter:
    """Combine filters: the first one that drops a sample decides. A changed sample goes on to the next."""

    def chained(sample: Sample) -> Drop | Sample | None:
        current = sample
        for each in filters:
            result = each(current)
            if isinstance(result, Drop):
                return result
            current = current if result is None else result
        return None if current is sample else current

    return chained

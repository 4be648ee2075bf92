"""Run a generator of steps to its end.

Sealing and rewriting are generators, so that a living run can write to the journal between two steps.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def run_to_end(steps: Generator[object, None, T]) -> T:
    """Run all steps; return what the generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result

"""Wait for a condition in a test."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# How long a condition may take on the busiest machine; a test that fails waits as long.
PATIENCE_S = 240.0


def until(claim: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """Call `claim` again and again until it returns something true, and return that."""
    deadline = time.monotonic() + patience_s
    while not (result := claim()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return result

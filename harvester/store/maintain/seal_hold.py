"""Keep answers out of shards that may yet be taken back, and sealing apart from taking back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class SealHold:
    """What a pass asks of the sealing beside it.

    Attributes:
        lock: held while answers are sealed, merged, or taken back.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self._first_unproven: Callable[[], float] = lambda: math.inf

    def hold_from(self, first_unproven: Callable[[], float]) -> None:
        """Seal no answer from this time on, in Unix seconds, as it is whenever a sealing begins."""
        self._first_unproven = first_unproven

    @property
    def before(self) -> float:
        """Only answers that came before this are sealed, in Unix seconds; infinity for all."""
        return self._first_unproven()

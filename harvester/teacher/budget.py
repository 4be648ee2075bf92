"""Ceilings on tokens and money: reserve before a send, settle with what was billed, refund what never left.

Pure. Money is integer micro-dollars. Spent plus reserved never passes a ceiling, so neither does billed,
as long as no answer costs more than its reservation.
"""

from __future__ import annotations

from enum import Enum


class Room(Enum):
    """Answer to a reservation."""

    GRANTED = "granted"
    LATER = "later"  # requests in flight hold what is missing; some may come back
    NEVER = "never"  # even alone it would pass the ceiling: the pass is over


class Budget:
    """What may still be spent. A ceiling of None is no ceiling."""

    def __init__(self, *, tokens: int | None = None, microusd: int | None = None) -> None:
        self.ceilings = (tokens, microusd)
        self.spent = (0, 0)
        self.reserved = (0, 0)

    def reserve(self, tokens: int, microusd: int) -> Room:
        """Set aside both, or neither."""
        wanted = (tokens, microusd)
        for want, ceiling, spent, reserved in zip(
            wanted, self.ceilings, self.spent, self.reserved, strict=True
        ):
            if ceiling is not None and spent + want > ceiling:
                return Room.NEVER
            if ceiling is not None and spent + reserved + want > ceiling:
                return Room.LATER
        self.reserved = (self.reserved[0] + tokens, self.reserved[1] + microusd)
        return Room.GRANTED

    def settle(self, reserved: tuple[int, int], billed: tuple[int, int]) -> None:
        """Turn a reservation into what it came to."""
        self.refund(reserved)
        self.spent = (self.spent[0] + billed[0], self.spent[1] + billed[1])

    def refund(self, reserved: tuple[int, int]) -> None:
        """Give a reservation back."""
        self.reserved = (self.reserved[0] - reserved[0], self.reserved[1] - reserved[1])

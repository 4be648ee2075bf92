"""Keep tokens and money within ceilings: reserve before a send, settle with what was billed. Pure.

Money is in millionths of a dollar, as integers. Spent plus reserved never exceeds a ceiling, so what is
billed doesn't either, as long as no answer costs more than its reservation.
"""

from __future__ import annotations

from enum import Enum


class Reservation(Enum):
    """Answer to a request for a reservation."""

    GRANTED = "granted"
    LATER = "later"  # requests in flight hold what is missing; some of it may come back
    NEVER = "never"  # it exceeds the ceiling even when nothing is in flight: the pass ends


class Budget:
    """Tokens and money that may still be spent. A ceiling of None is no ceiling.

    Attributes:
        ceilings, spent, reserved: (tokens, micro-dollars).
    """

    def __init__(self, *, tokens: int | None = None, microusd: int | None = None) -> None:
        self.ceilings = (tokens, microusd)
        self.spent = (0, 0)
        self.reserved = (0, 0)

    def reserve(self, tokens: int, microusd: int) -> Reservation:
        """Reserve both amounts, or neither."""
        wanted = (tokens, microusd)
        for amount, ceiling, spent, reserved in zip(
            wanted, self.ceilings, self.spent, self.reserved, strict=True
        ):
            if ceiling is not None and spent + amount > ceiling:
                return Reservation.NEVER
            if ceiling is not None and spent + reserved + amount > ceiling:
                return Reservation.LATER
        self.reserved = (self.reserved[0] + tokens, self.reserved[1] + microusd)
        return Reservation.GRANTED

    def settle(self, reserved: tuple[int, int], billed: tuple[int, int]) -> None:
        """Replace a reservation by what was billed."""
        self.refund(reserved)
        self.spent = (self.spent[0] + billed[0], self.spent[1] + billed[1])

    def refund(self, reserved: tuple[int, int]) -> None:
        """Give a reservation back: nothing was billed."""
        self.reserved = (self.reserved[0] - reserved[0], self.reserved[1] - reserved[1])

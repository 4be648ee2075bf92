"""Name the limits a teacher may set: a quantity (requests, tokens) per period. Pure values.

A limit is identified by a `LimitKey`. Its `label` ("tokens per minute") is for people, and is also the name
under which status.json and the journal store the limit; nothing decides by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from harvester.config.teacher_section import RateLimitsSection

SECOND_S = 1.0
MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 86_400.0
MONTH_S = 30 * DAY_S
_PERIOD_NAMES = {SECOND_S: "second", MINUTE_S: "minute", HOUR_S: "hour", DAY_S: "day", MONTH_S: "month"}


@dataclass(frozen=True, slots=True)
class Charge:
    """Tokens of one request: estimated before it is sent, as reported by the teacher afterwards.

    `output_tokens` are those of all `answers` that it asks for.
    """

    input_tokens: int
    output_tokens: int
    answers: int = 1


class Quantity(Enum):
    """What a limit counts. The value is the word used in labels."""

    REQUESTS = "requests"
    TOKENS = "tokens"  # input and output together
    INPUT_TOKENS = "input tokens"
    OUTPUT_TOKENS = "output tokens"

    def amount(self, charge: Charge) -> int:
        """Return how much one request with these tokens takes from a limit on this quantity."""
        match self:
            case Quantity.REQUESTS:
                return 1
            case Quantity.TOKENS:
                return charge.input_tokens + charge.output_tokens
            case Quantity.INPUT_TOKENS:
                return charge.input_tokens
            case Quantity.OUTPUT_TOKENS:
                return charge.output_tokens


@dataclass(frozen=True, slots=True)
class LimitKey:
    """One limit of a teacher: what is counted, and over how many seconds.

    `is_own` marks what one address may take, beside its part of the same limit of the credential.
    """

    quantity: Quantity
    period_s: float
    is_learned: bool = False
    is_own: bool = False

    @property
    def lasts_longer(self) -> bool:
        """Whether the period is longer than a minute: what was used of it shows little of the rate."""
        return self.period_s > MINUTE_S

    @property
    def label(self) -> str:
        """Name for people, status.json and the journal, as in "tokens per minute"."""
        period = _PERIOD_NAMES.get(self.period_s) or f"{self.period_s:g} s"
        learned = ", learned from refusals" if self.is_learned else ""
        own = ", of this address" if self.is_own else ""
        return f"{self.quantity.value} per {period}{learned}{own}"


REQUESTS_PER_MINUTE = LimitKey(Quantity.REQUESTS, MINUTE_S)
TOKENS_PER_MINUTE = LimitKey(Quantity.TOKENS, MINUTE_S)
INPUT_TOKENS_PER_MINUTE = LimitKey(Quantity.INPUT_TOKENS, MINUTE_S)
OUTPUT_TOKENS_PER_MINUTE = LimitKey(Quantity.OUTPUT_TOKENS, MINUTE_S)
REQUESTS_PER_DAY = LimitKey(Quantity.REQUESTS, DAY_S)
TOKENS_PER_DAY = LimitKey(Quantity.TOKENS, DAY_S)
# The rate found by `learned_rate` where the teacher states no limit.
LEARNED_REQUESTS = LimitKey(Quantity.REQUESTS, SECOND_S, is_learned=True)


def configured_limits(limits: RateLimitsSection, *, is_own: bool = False) -> dict[LimitKey, float]:
    """Return the limits that a table sets, each in units per its own period.

    Args:
        is_own: the table is that of one address, not of the credential.
    """
    values = {
        REQUESTS_PER_MINUTE: limits.requests_per_minute,
        TOKENS_PER_MINUTE: limits.tokens_per_minute,
        INPUT_TOKENS_PER_MINUTE: limits.input_tokens_per_minute,
        OUTPUT_TOKENS_PER_MINUTE: limits.output_tokens_per_minute,
        REQUESTS_PER_DAY: limits.requests_per_day,
        TOKENS_PER_DAY: limits.tokens_per_day,
    }
    return {replace(key, is_own=is_own): float(value) for key, value in values.items() if value is not None}

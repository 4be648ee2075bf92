"""Keep tokens and money within ceilings: reserve before a send, settle with what was billed. Pure.

Money is in millionths of a dollar, as integers. A ceiling holds for a span: one run, the whole life of the
store, a day or a month (both UTC). In each span spent plus reserved never exceeds a ceiling, so what is
billed doesn't either, as long as no answer costs more than its reservation.

Some do: hidden reasoning is billed on top of `max_tokens`. How far an answer went beyond its reservation is
learned, and added to the reservation of every other, also of those in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from harvester.config.budget_spans import BudgetSpan

# (tokens, micro-dollars)
Amounts = tuple[int, int]
NOTHING: Amounts = (0, 0)

# What a span is called in a sentence, with the table of harvest.toml that holds its ceiling.
SPAN_NAMES: Mapping[BudgetSpan, tuple[str, str]] = {
    BudgetSpan.RUN: ("this run", "[budget]"),
    BudgetSpan.STORE: ("this store", "[budget.store]"),
    BudgetSpan.DAY: ("this day", "[budget.day]"),
    BudgetSpan.MONTH: ("this month", "[budget.month]"),
}


class Reservation(Enum):
    """Answer to a request for a reservation."""

    GRANTED = "granted"
    LATER = "later"  # requests in flight hold what is missing; some of it may come back
    NEVER = "never"  # it exceeds a ceiling even when nothing is in flight: the pass ends


@dataclass(slots=True)
class Ceiling:
    """The ceilings of one span, None for none, and what was spent in it so far.

    `ends_at` is when the span ends and its spending starts at nothing again, in Unix seconds.
    """

    span: BudgetSpan
    tokens: int | None = None
    microusd: int | None = None
    spent: Amounts = NOTHING
    ends_at: float = math.inf

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """(tokens, micro-dollars)."""
        return self.tokens, self.microusd

    def lacks(self, amounts: Amounts, reserved: Amounts = NOTHING) -> bool:
        """Whether these amounts exceed a ceiling, on top of what was spent and `reserved`."""
        return any(
            limit is not None and spent + held + amount > limit
            for amount, limit, spent, held in zip(amounts, self.limits, self.spent, reserved, strict=True)
        )

    def charge(self, amounts: Amounts) -> None:
        """Add what was billed to what was spent."""
        self.spent = _sum(self.spent, amounts)

    def start_new_span(self, wall: float) -> None:
        """Start again at nothing once the span is over. `wall` is now in Unix seconds."""
        if wall >= self.ends_at:
            self.spent = NOTHING
            self.ends_at = self.span.end(wall)

    def set_tokens(self, tokens: int) -> None:
        """Change the ceiling in tokens from now on."""
        self.tokens = tokens

    def set_usd(self, usd: float) -> None:
        """Change the ceiling in dollars from now on."""
        self.microusd = int(usd * 1_000_000)

    def set_limits(self, tokens: int | None, microusd: int | None) -> None:
        """Change both ceilings from now on; None for none."""
        self.tokens, self.microusd = tokens, microusd

    def as_dict(self, reserved: Amounts = NOTHING) -> dict[str, float | None]:
        """Return ceilings, what was spent, what is left and when the span ends; None for none."""
        tokens_left, microusd_left = (
            None if limit is None else max(0, limit - spent - held)
            for limit, spent, held in zip(self.limits, self.spent, reserved, strict=True)
        )
        return {
            "tokens": self.tokens,
            "microusd": self.microusd,
            "tokens_spent": self.spent[0],
            "microusd_spent": self.spent[1],
            "tokens_left": tokens_left,
            "microusd_left": microusd_left,
            "ends_at": self.ends_at if math.isfinite(self.ends_at) else None,
        }


class Budget:
    """Tokens and money that may still be spent, in every span.

    Args:
        ceilings: one for each span; a span without one is not bounded.

    Attributes:
        ceilings: by span.
        overshoot: the most that one answer was billed beyond its own reservation.
        may_grow: whether ceilings are parts of larger ones that may grow: what exceeds one waits then.
        short: what the smallest request wanted that had to wait since `take_short`; None where none had to.
    """

    def __init__(self, *ceilings: Ceiling) -> None:
        self.ceilings = {span: Ceiling(span) for span in BudgetSpan}
        self.ceilings |= {ceiling.span: ceiling for ceiling in ceilings}
        self.overshoot = NOTHING
        self._held, self._answers = NOTHING, 0
        self.may_grow = False
        self.short: Amounts | None = None

    @property
    def reserved(self) -> Amounts:
        """(tokens, micro-dollars) of the requests in flight."""
        return self.most(self._held, self._answers)

    def most(self, amounts: Amounts, answers: int = 1) -> Amounts:
        """Return what so many answers may be billed that reserve these amounts, with what was learned."""
        return _sum(amounts, (self.overshoot[0] * answers, self.overshoot[1] * answers))

    def learn(self, reserved: Amounts, billed: Amounts, answers: int = 1) -> None:
        """Note what answers were billed by the teacher's own count that had reserved these amounts.

        Args:
            reserved: without what was learned before.
        """
        beyond = (-(-(bill - held) // answers) for bill, held in zip(billed, reserved, strict=True))
        tokens, microusd = (max(a, b) for a, b in zip(beyond, self.overshoot, strict=True))
        self.overshoot = tokens, microusd

    def take_short(self) -> Amounts | None:
        """Return `short`, and forget it."""
        short, self.short = self.short, None
        return short

    def start_new_spans(self, wall: float) -> None:
        """Begin a new day and a new month once the last one is over. `wall` is now in Unix seconds."""
        for ceiling in self.ceilings.values():
            ceiling.start_new_span(wall)

    def reserve(self, tokens: int, microusd: int, answers: int = 1) -> Reservation:
        """Reserve both amounts, and what was learned of so many answers, in every span or in none."""
        wanted = self.most((tokens, microusd), answers)
        if not self.may_grow and self.exhausted(wanted) is not None:
            return Reservation.NEVER
        if any(ceiling.lacks(wanted, self.reserved) for ceiling in self.ceilings.values()):
            self.short = wanted if self.short is None else min(self.short, wanted)
            return Reservation.LATER
        self._held, self._answers = _sum(self._held, (tokens, microusd)), self._answers + answers
        return Reservation.GRANTED

    def exhausted(self, wanted: Amounts) -> Ceiling | None:
        """Return the ceiling that these amounts exceed even when nothing is in flight; None for none."""
        return next((ceiling for ceiling in self.ceilings.values() if ceiling.lacks(wanted)), None)

    def as_dict(self) -> dict[str, dict[str, float | None]]:
        """Return, for each span with a ceiling, what status.json says of it (data/FORMAT.md, `budgets`)."""
        return {
            span.value: ceiling.as_dict(self.reserved)
            for span, ceiling in self.ceilings.items()
            if ceiling.limits != (None, None)
        }

    def settle(self, reserved: Amounts, billed: Amounts, answers: int = 1) -> None:
        """Replace a reservation by what was billed."""
        self.refund(reserved, answers)
        for ceiling in self.ceilings.values():
            ceiling.charge(billed)

    def commit(self, reserved: Amounts) -> Amounts:
        """Count a reservation as spent: that of a batch lasts for hours, and must not be spent twice.

        Returns what was counted.
        """
        counted = self.most(reserved)
        self.settle(reserved, counted)
        return counted

    def correct(
        self, committed: Amounts, billed: Amounts, *, sent_at: float, wall: float, in_run: bool
    ) -> None:
        """Replace what `commit` counted by what was billed, in the spans in which it was counted.

        Args:
            sent_at: when the batch was sent; `wall`: now; both in Unix seconds.
            in_run: the batch belongs to the span of this run.
        """
        change = billed[0] - committed[0], billed[1] - committed[1]
        for span, ceiling in self.ceilings.items():
            is_counted = in_run if span is BudgetSpan.RUN else sent_at >= span.start(wall)
            if is_counted:
                ceiling.charge(change)

    def refund(self, reserved: Amounts, answers: int = 1) -> None:
        """Give a reservation back: nothing was billed."""
        self._held = self._held[0] - reserved[0], self._held[1] - reserved[1]
        self._answers -= answers


def why_exhausted(ceiling: Ceiling, wanted: Amounts, overshoot: Amounts = NOTHING) -> tuple[str, str]:
    """Return why no request is sent any more, with the amounts, and what the operator can do about it.

    Args:
        ceiling: the one that is reached.
        wanted: what the next request would reserve, which is the most that its answer can cost.
        overshoot: the part of it that was learned from answers billed beyond their reservation.
    """
    name, table = SPAN_NAMES[ceiling.span]
    in_tokens = ceiling.tokens is not None and ceiling.spent[0] + wanted[0] > ceiling.tokens
    if in_tokens and ceiling.tokens is not None:
        spent, limit = f"{ceiling.spent[0]:,}", f"{ceiling.tokens:,} tokens"
        most, left = f"{wanted[0]:,} tokens", f"{max(0, ceiling.tokens - ceiling.spent[0]):,}"
    else:
        microusd = ceiling.microusd or 0
        spent, limit = usd_text(ceiling.spent[1]), usd_text(microusd)
        most, left = usd_text(wanted[1]), usd_text(max(0, microusd - ceiling.spent[1]))
    reason = (
        f"the budget of {name} is used up: {spent} of {limit} spent; the next request would reserve {most}, "
        f"the most that its answer can take, and {left} is left"
    )
    if any(overshoot):
        beyond = f"{overshoot[0]:,} tokens" if in_tokens else usd_text(overshoot[1])
        reason += f" ({beyond} of it since an answer was billed so much beyond its max_tokens)"
    remedy = f"raise {table}; a lower [sampling] max_tokens reserves less"
    if any(overshoot):
        remedy += " (any change of [sampling] or [teacher.price] forgets what that answer was billed)"
    if math.isfinite(ceiling.ends_at):
        remedy += f"; the next one begins {datetime.fromtimestamp(ceiling.ends_at, UTC):%Y-%m-%d %H:%M} UTC"
    return reason, remedy


def usd_text(microusd: int) -> str:
    """Return an amount in dollars, with the digits that small amounts need."""
    return f"${microusd / 1e6:,.2f}" if microusd >= 100_000_000 else f"${microusd / 1e6:,.4f}"


def _sum(first: Amounts, second: Amounts) -> Amounts:
    return first[0] + second[0], first[1] + second[1]

"""Divide counts and ceilings of a budget among the ranks of a fleet by what each can use. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harvester.teacher.sharing.fair_shares import Want, divide

# One ceiling of the budget: its span, and 0 for tokens or 1 for micro-dollars.
CeilingKey = tuple[str, int]


def divide_count(whole: int, wants: Mapping[int, Want]) -> dict[int, int]:
    """Return each rank's part of a count; together they are at most `whole`, and each is 1 or more.

    Args:
        whole: as many as there are ranks, or more.
        wants: by rank; demands are parts of the whole.
    """
    free = whole - len(wants)
    shares = divide(wants) if wants else {}
    parts = {rank: 1 + int(free * share + 1e-9) for rank, share in shares.items()}
    left = whole - sum(parts.values())  # by rounding
    for rank in sorted(wants)[: max(0, left)]:
        parts[rank] += 1
    return parts


def within(target: float, held: float, free: float) -> float:
    """Return what a rank may have: less at once, more only as far as it is free.

    Args:
        held: what it has.
        free: what nobody has.
    """
    return min(target, held + max(0, free))


@dataclass(slots=True)
class Account:
    """The budget of one rank, by ceiling.

    Attributes:
        granted: its ceilings; it keeps what is spent and reserved at or below these.
        spent: what its store was charged.
        reserved: tokens and micro-dollars of its requests in flight.
        short: what a request of it waits for, in tokens and micro-dollars; None for none.
        is_active: whether it may spend. What a rank was granted that is not active counts as spent.
    """

    granted: dict[CeilingKey, int] = field(default_factory=dict)
    spent: dict[CeilingKey, int] = field(default_factory=dict)
    reserved: tuple[int, int] = (0, 0)
    short: tuple[int, int] | None = None
    is_active: bool = True

    def used(self, ceiling: CeilingKey) -> int:
        """What is spent and reserved."""
        return self.spent.get(ceiling, 0) + self.reserved[ceiling[1]]


@dataclass(frozen=True, slots=True)
class Targets:
    """What each active rank should be granted, and which ranks can send nothing any more."""

    granted: Mapping[int, Mapping[CeilingKey, int]]
    final: frozenset[int]


def divide_budget(
    whole: Mapping[CeilingKey, int], elsewhere: Mapping[CeilingKey, int], accounts: Mapping[int, Account]
) -> Targets:
    """Divide what is left: equal parts, on top of what each rank has spent and reserved.

    What is left may not reach for a request of every rank. Then one rank gets all of it: the first whose
    request fits. A rank is through when its request would not fit even if nothing were in flight anywhere.

    Args:
        elsewhere: what was spent in stores that are no longer part of the fleet.
    """
    active = {rank: account for rank, account in accounts.items() if account.is_active}
    left, most = {}, {}
    for ceiling, limit in whole.items():
        gone = elsewhere.get(ceiling, 0)
        gone += sum(each.granted.get(ceiling, 0) for each in accounts.values() if not each.is_active)
        left[ceiling] = max(0, limit - gone - sum(account.used(ceiling) for account in active.values()))
        most[ceiling] = limit - gone - sum(account.spent.get(ceiling, 0) for account in active.values())
    equal = {ceiling: amount // max(1, len(active)) for ceiling, amount in left.items()}

    def fits(account: Account, amounts: Mapping[CeilingKey, int]) -> bool:
        short = account.short or (0, 0)
        return all(short[ceiling[1]] <= amount for ceiling, amount in amounts.items())

    final = frozenset(rank for rank, account in active.items() if account.short and not fits(account, most))
    waiting = [rank for rank in sorted(active) if active[rank].short and rank not in final]
    favoured = next((rank for rank in waiting if fits(active[rank], left)), None)
    if favoured is not None and fits(active[favoured], equal):
        favoured = None
    granted = {}
    for rank, account in active.items():
        more = equal if favoured is None else left if rank == favoured else dict.fromkeys(left, 0)
        granted[rank] = {ceiling: account.used(ceiling) + more[ceiling] for ceiling in whole}
    return Targets(granted, final)

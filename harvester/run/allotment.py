"""Use the part of a harvest's limits and budget that the coordinator of a fleet allocates to this pass.

Twice a second the pass reports what it has, uses and wants, and gets what it may use until the next report:
a share of the rate limits, configured or learned (as harvests of one machine share them, `shared_limits`), a
number of requests in flight for each address, and a ceiling for each span of the budget. The coordinator
counts what it has allocated as used until a report says less, so the parts never add up to more than the
whole. A pass that hears nothing for FENCE_S sends nothing: its part may be another's by then.

Messages are JSON values, so that any transport can carry them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from harvester.config.budget_spans import BudgetSpan
from harvester.teacher.budget import Budget
from harvester.teacher.endpoints import Endpoints
from harvester.teacher.sharing.limit_leases import LedgerRow
from harvester.teacher.sharing.shared_limits import SharedLimits

Message = Mapping[str, Any]
# Sends a report and returns the answer. It is called in a thread, and raises a HarvesterError if none comes.
Exchange = Callable[[Message], Message]

EXCHANGE_EVERY_S = 0.5
# A pass without an answer for this long sends nothing. The coordinator waits longer before it gives the part
# to others (`EXPIRY_S` of `fleet.allocator`).
FENCE_S = 6.0
# How often the last report is sent until it is heard. Without it, money that was spent may be allocated
# again.
LEAVE_TRIES = 3
# What holds the pass, in its pauses.
_SOURCE = "fleet"


@dataclass(frozen=True, slots=True)
class Coordination:
    """How a pass asks for its part.

    Attributes:
        exchange: see `Exchange`.
        pause, resume: hold the pass for a source and a reason, and no longer for this source.
    """

    exchange: Exchange
    pause: Callable[[str, str], None]
    resume: Callable[[str], None]


@contextlib.asynccontextmanager
async def allotted(
    coordination: Coordination, endpoints: Endpoints, shared: SharedLimits
) -> AsyncIterator[None]:
    """Use what is allocated during the block, from before anything is sent.

    Args:
        shared: the leases of the rate limits; they are not in the ledger of the machine.
    """
    allotment = _Allotment(coordination, endpoints, shared)
    await allotment.renew()
    renewing = asyncio.create_task(allotment.watch())
    try:
        yield
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing
        await allotment.leave()


class _Allotment:
    """What one pass may use."""

    def __init__(self, coordination: Coordination, endpoints: Endpoints, shared: SharedLimits) -> None:
        self._coordination = coordination
        self._endpoints = endpoints
        self._shared = shared
        # No more than this machine can have, whatever is allocated.
        self._most = {queue.endpoint: int(queue.limiter.window.ceiling) for queue in endpoints.queues}
        # What was allocated last, by base URL; nothing yet.
        self._windows = dict.fromkeys(self._most, 0)
        self._shares = dict.fromkeys(self._most, 0.0)
        self._heard_at = time.monotonic()
        self._is_held = False
        budget = endpoints.policies.budget
        budget.may_grow = True
        for ceiling in budget.ceilings.values():
            tokens, microusd = (
                None if limit is None else min(limit, spent)
                for limit, spent in zip(ceiling.limits, ceiling.spent, strict=True)
            )
            ceiling.set_limits(tokens, microusd)
        self._hold("waits for its part of the limits")

    @property
    def _budget(self) -> Budget:
        return self._endpoints.policies.budget

    async def watch(self) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(EXCHANGE_EVERY_S)
            await self.renew()

    async def renew(self) -> None:
        """Report, and apply the answer; hold the pass when there has been none for too long."""
        began = time.monotonic()
        try:
            answer = await asyncio.to_thread(self._coordination.exchange, self._report())
        except Exception as error:  # noqa: BLE001 - whatever it was, there was no word: the fence must hold
            if time.monotonic() - self._heard_at > FENCE_S:
                self._hold(f"no word from the fleet's coordinator: {error}")
            return
        if time.monotonic() - began > FENCE_S:  # what it allocated may have expired meanwhile
            return
        self._heard_at = began
        self._apply(answer)

    async def leave(self) -> None:
        """Report for the last time: all but what was spent is free for others."""
        report = {**self._report(), "left": True}
        for _ in range(LEAVE_TRIES):
            with contextlib.suppress(Exception):  # whatever it was, there was no word
                await asyncio.to_thread(self._coordination.exchange, report)
                return

    def _hold(self, reason: str) -> None:
        self._is_held = True
        self._coordination.pause(_SOURCE, reason)

    def _report(self) -> dict[str, Any]:
        budget = self._budget
        budget.start_new_spans(self._endpoints.policies.clock.wall())
        short = budget.take_short()
        return {
            "left": False,
            "rows": {
                url: encoded_row(replace(row, share=self._shares[url], teacher="", config=""))
                for url, row in self._shared.rows().items()
            },
            "windows": {url: self._window(url) for url in self._windows},
            "budgets": {
                span.value: {
                    "spent": list(ceiling.spent),
                    "ceiling": list(ceiling.limits),
                    "ends_at": ceiling.ends_at if math.isfinite(ceiling.ends_at) else None,
                }
                for span, ceiling in budget.ceilings.items()
                if ceiling.limits != (None, None)
            },
            "reserved": list(budget.reserved),
            "short": None if short is None else list(short),
        }

    def _window(self, url: str) -> dict[str, Any]:
        """Return what was allocated for an address, what is in flight, and whether it could use more."""
        window = self._endpoints.queue_of(url).limiter.window
        is_full = window.in_flight >= int(window.ceiling)
        return {
            "allocated": self._windows[url],
            "in_flight": window.in_flight,
            "size": int(window.size),
            "wants_more": is_full and int(window.ceiling) < self._most[url],
            "most": self._most[url],
        }

    def _apply(self, answer: Message) -> None:
        for url, (share, lessons) in answer["shares"].items():
            self._shares[url] = share
            if share > 0:
                self._shared.apply(url, share, [decoded_row(row) for row in lessons])
        for url, number in answer["windows"].items():
            if number >= 1 and number != self._windows[url]:
                self._endpoints.queue_of(url).limiter.window.set_ceiling(min(number, self._most[url]))
            self._windows[url] = number
        self._apply_budget(answer["budgets"], is_final=answer["is_final"])
        if min(self._shares.values()) <= 0 or min(self._windows.values()) < 1:
            self._hold("waits until other ranks have given a part of the limits back")
        elif self._is_held:
            self._is_held = False
            self._coordination.resume(_SOURCE)
        self._endpoints.recheck()
        self._endpoints.on_room()

    def _apply_budget(self, ceilings: Mapping[str, list[int | None]], *, is_final: bool) -> None:
        """Set the ceilings; never below what is spent, nor below what is reserved and was allocated already.

        What is in flight reserves more once an answer was billed beyond its reservation. That raises no
        ceiling: others were allocated the rest.
        """
        budget = self._budget
        for name, limits in ceilings.items():
            ceiling = budget.ceilings[BudgetSpan(name)]
            tokens, microusd = (
                None
                if limit is None
                else max(limit, spent, min(spent + reserved, limit if held is None else held))
                for limit, held, spent, reserved in zip(
                    limits, ceiling.limits, ceiling.spent, budget.reserved, strict=True
                )
            )
            ceiling.set_limits(tokens, microusd)
        budget.may_grow = not is_final


def encoded_row(row: LedgerRow) -> dict[str, Any]:
    """Return a row as JSON values: None for what is infinite."""
    infinite = (math.inf, -math.inf)
    return {name: None if value in infinite else value for name, value in asdict(row).items()}


def decoded_row(row: Message) -> LedgerRow:
    """Return the row that `encoded_row` made these values of."""
    absent = {"demand": math.inf, "at": -math.inf, "learned_at": -math.inf}
    values: dict[str, Any] = {name: absent[name] if value is None else value for name, value in row.items()}
    return LedgerRow(**values)

"""Share the limits of a teacher with other harvests of this machine that use the same host and credential.

Each harvest leases a share of the limit (`limit_leases`) and multiplies with it what is configured, stated by
headers or learned. It renews the lease twice a second. While its requests wait for the rate it wants all that
it gets, else a little more than it uses, so what one does not need the others get. What one learns about the
rate holds for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harvester.errors import HarvesterError
from harvester.system.clock import Clock
from harvester.teacher.limiter.rate_limiter import Limiter
from harvester.teacher.sharing.demand import Demand
from harvester.teacher.sharing.limit_leases import (
    EXPIRY_S,
    LedgerRow,
    LimitLedger,
    state_file,
    teacher_digest,
)

RENEW_EVERY_S = 0.5
# A harvest whose requests don't wait for the rate wants this many times what it uses.
HEADROOM = 1.3


@dataclass(slots=True)
class _Lease:
    """The share of one address, and what was used of it.

    Attributes:
        demand: of the address.
        others: the other harvests that share.
        adopted: what was learned elsewhere and is used here: by whom, and when.
    """

    limiter: Limiter
    row: LedgerRow
    demand: Demand
    others: list[LedgerRow] = field(default_factory=list)
    adopted: tuple[str, float] = ("", -math.inf)


@dataclass(frozen=True, slots=True)
class Participant:
    """The harvest that shares.

    Attributes:
        key: the credential, None for none; only its digest is written.
        priority: weight among the harvests that share.
        config: path of harvest.toml, for the others to show.
    """

    key: str | None
    priority: int
    config: str


class SharedLimits:
    """The leases of one pass.

    Args:
        limiters: by base URL.
        participant: the harvest.
        clock: that of the limiters. That of the machine is the same for all its processes.
        changed: called when a share has changed.
        complain: gets the error if limits can't be shared, at most once.
    """

    def __init__(
        self,
        limiters: Mapping[str, Limiter],
        participant: Participant,
        *,
        clock: Clock,
        changed: Callable[[], None],
        complain: Callable[[HarvesterError], None],
    ) -> None:
        self._clock = clock
        self._changed = changed
        self._complain = complain
        self._is_reported = False
        self._renewed_at = clock.now()
        self._ledger: LimitLedger | None = None
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        pid = os.getpid()
        rows = {
            url: LedgerRow(
                teacher_digest(url, participant.key),
                self._id,
                pid,
                participant.config,
                -math.inf,
                participant.priority,
            )
            for url in limiters
        }
        self._leases = {
            url: _Lease(limiter, rows[url], Demand(limiter, HEADROOM)) for url, limiter in limiters.items()
        }

    async def join(self) -> None:
        """Take part, before anything is sent. While the ledger can't be used, limits are not shared."""
        try:
            if self._ledger is None:
                self._ledger = await asyncio.to_thread(LimitLedger, state_file())
            await self.renew()
        except (OSError, sqlite3.Error, RuntimeError) as error:
            self._report(error)

    async def watch(self) -> None:
        """Renew the leases until cancelled."""
        while True:
            await self._clock.sleep(RENEW_EVERY_S)
            await self.join()

    def _report(self, error: Exception) -> None:
        """Complain once that limits are not shared; not before the lease has expired if the file was busy."""
        is_busy = getattr(error, "sqlite_errorcode", None) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
        if self._is_reported or (is_busy and self._clock.now() - self._renewed_at <= EXPIRY_S):
            return
        self._is_reported = True
        reason = f"{state_file()}: {error}" if isinstance(error, sqlite3.Error) else str(error)
        self._complain(
            HarvesterError(
                f"limits are not shared with other harvests of this machine: {reason}",
                remedy="set XDG_STATE_HOME to a folder that can be written, or [run] share_limits = false",
            )
        )

    async def leave(self) -> None:
        """Give the shares back."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            with contextlib.suppress(sqlite3.Error):
                await asyncio.to_thread(ledger.leave, self._id)

    async def renew(self) -> None:
        """Renew the leases once.

        Raises:
            sqlite3.Error: the ledger is busy or can't be used.
        """
        ledger = self._ledger
        if ledger is None:
            return
        for url, lease in self._leases.items():
            lease.row = _renewed(lease, self._clock.now())
            share, others = await asyncio.to_thread(ledger.renew, lease.row)
            self.apply(url, share, others)
        self._renewed_at = self._clock.now()

    def rows(self) -> dict[str, LedgerRow]:
        """Return what each address has, wants and has learned now, by base URL."""
        for lease in self._leases.values():
            lease.row = _renewed(lease, self._clock.now())
        return {url: lease.row for url, lease in self._leases.items()}

    def apply(self, url: str, share: float, others: list[LedgerRow]) -> None:
        """Use this share at an address from now on, and what others have learned about its rate.

        Args:
            others: the rows of the other harvests there.
        """
        lease, now = self._leases[url], self._clock.now()
        lease.others = others
        limiter = lease.limiter
        is_changed = share != limiter.share
        limiter.set_share(share, now)
        lesson = _newest_lesson([lease.row, *lease.others])
        if lesson is not None and lesson.id != self._id:
            name = (lesson.id, lesson.learned_at)
            limiter.adopt_rate(
                lesson.rate, lesson.found, lesson.learned_at, now, is_new=name != lease.adopted
            )
            lease.adopted = name
            is_changed = True
        if is_changed:
            self._changed()

    def gauges(self) -> list[dict[str, Any]]:
        """Return who else takes part, by address; empty for nobody."""
        return [
            {
                "endpoint": url,
                "share": round(lease.limiter.share, 3),
                "others": [
                    {
                        "pid": row.pid,
                        "config": row.config,
                        "share": round(row.share, 3),
                        "priority": row.weight,
                    }
                    for row in lease.others
                ],
            }
            for url, lease in self._leases.items()
            if lease.others
        ]


def _newest_lesson(rows: Sequence[LedgerRow]) -> LedgerRow | None:
    """Return the row of the harvest that learned last; None where nobody has learned anything."""
    return max((row for row in rows if row.rate), key=lambda row: row.learned_at, default=None)


def _renewed(lease: _Lease, now: float) -> LedgerRow:
    """Return the row of a lease as it is to be written."""
    learned = lease.limiter.learned_rate
    rate, found = learned.lesson() if learned.is_own else (0.0, 0.0)
    return replace(
        lease.row,
        at=now,
        demand=lease.demand.fraction(lease.limiter.share, now),
        share=lease.limiter.share if lease.row.at > -math.inf else 0.0,
        rate=rate,
        found=found,
        learned_at=learned.learned_at if learned.is_own else -math.inf,
    )

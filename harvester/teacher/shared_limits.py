"""Share the limits of a teacher with other harvests of this machine that use the same host and credential.

Each harvest leases a share of the limit (`limit_ledger`) and multiplies with it what is configured, stated by
headers or learned. It renews the lease twice a second, by what it used of its share, so what one does not
need the others get. What one learns about the rate holds for all.
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

from harvester.system.clock import Clock
from harvester.teacher.limit_ledger import LedgerRow, LimitLedger, state_file, teacher_digest
from harvester.teacher.rate_limiter import Limiter

RENEW_EVERY_S = 0.5
# Who uses at least this part of its share wants more; else what it uses and this much more.
HUNGRY = 0.85
HEADROOM = 1.3


@dataclass(slots=True)
class _Lease:
    """The share of one address, and what was used of it since the last renewal."""

    limiter: Limiter
    row: LedgerRow
    used: Mapping[str, float] = field(default_factory=dict)
    used_at: float = 0.0
    others: list[LedgerRow] = field(default_factory=list)
    adopted: tuple[str, float] = ("", -math.inf)

    def demand(self, now: float) -> float:
        """Return the share that the harvest could use, infinity for all that it gets."""
        buckets = {key.label: bucket for key, bucket in self.limiter.buckets.items() if not key.lasts_longer}
        used, self.used = self.used, {name: bucket.taken for name, bucket in buckets.items()}
        seconds, self.used_at = now - self.used_at, now
        if not buckets or seconds <= 0 or used.keys() != buckets.keys():
            return math.inf
        part = max((self.used[name] - used[name]) / (buckets[name].rate * seconds) for name in buckets)
        return math.inf if part >= HUNGRY else max(0.0, part) * HEADROOM * self.limiter.share


class SharedLimits:
    """The leases of one pass.

    Args:
        limiters: by base URL.
        key: the credential; only its digest is written.
        priority: weight among the harvests that share.
        config: path of harvest.toml, for the others to show.
        clock: that of the limiters. That of the machine is the same for all its processes.
        changed: called when a share has changed.
    """

    def __init__(
        self,
        limiters: Mapping[str, Limiter],
        key: str | None,
        *,
        priority: int,
        config: str,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        self._clock = clock
        self._changed = changed
        self._ledger: LimitLedger | None = None
        self._id = f"{os.getpid()}-{secrets.token_hex(4)}"
        pid = os.getpid()
        rows = {
            url: LedgerRow(teacher_digest(url, key), self._id, pid, config, -math.inf, priority)
            for url in limiters
        }
        self._leases = {url: _Lease(limiter, rows[url]) for url, limiter in limiters.items()}

    async def join(self) -> None:
        """Take part, before anything is sent. Where the ledger can't be used, limits are not shared."""
        with contextlib.suppress(OSError, sqlite3.Error, RuntimeError):
            self._ledger = await asyncio.to_thread(LimitLedger, state_file())
            await self.renew()

    async def watch(self) -> None:
        """Renew the leases until cancelled."""
        while self._ledger is not None:
            await self._clock.sleep(RENEW_EVERY_S)
            with contextlib.suppress(sqlite3.Error):  # busy for once; the lease lasts longer than that
                await self.renew()

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
        for lease in self._leases.values():
            lease.row = _renewed(lease, self._clock.now())
            share, lease.others = await asyncio.to_thread(ledger.renew, lease.row)
            self._apply(lease, share, self._clock.now())

    def _apply(self, lease: _Lease, share: float, now: float) -> None:
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
        demand=lease.demand(now),
        share=lease.limiter.share if lease.row.at > -math.inf else 0.0,
        rate=rate,
        found=found,
        learned_at=learned.learned_at if learned.is_own else -math.inf,
    )

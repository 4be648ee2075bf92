"""What a store's answers cost, and which attempts a teacher may have charged without an answer to hold."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harvester.store import paths
from harvester.store.journal.journal import Journal


@dataclass(frozen=True, slots=True)
class PossiblyBilledAttempt:
    """An attempt that was possibly billed. `at` is Unix seconds; `code` is "" where no outcome was noted."""

    key: bytes
    at: float
    run_id: str
    code: str
    reserved_tokens: int
    reserved_microusd: int

    def facts(self) -> dict[str, Any]:
        """For machines: the time as ISO 8601."""
        return {
            "key": self.key.hex(),
            "at": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds"),
            "run_id": self.run_id,
            "code": self.code,
            "reserved_tokens": self.reserved_tokens,
            "reserved_microusd": self.reserved_microusd,
        }


@dataclass(frozen=True, slots=True)
class Bill:
    """Answers that were paid, those of them that a held key made useless included, and the suspects."""

    billed: int
    billed_microusd: int
    possibly_billed: tuple[PossiblyBilledAttempt, ...]

    @property
    def possibly_billed_microusd(self) -> int:
        """What was reserved for the suspects."""
        return sum(one.reserved_microusd for one in self.possibly_billed)


def compute_canary_bill(store: Path, *, alive: bool) -> Bill | None:
    """The bill of the canaries' own store, inside this one; None where none was ever asked.

    Raises:
        StoreError, StoreCorrupt: its journal can't be read.
    """
    if not (store / paths.CANARY / paths.JOURNAL).exists():
        return None
    with Journal.open(store / paths.CANARY, read_only=True) as journal:
        return compute_bill(journal, alive=alive)


def compute_bill(journal: Journal, *, alive: bool) -> Bill:
    """The bill of a store; while its process is `alive`, what is in flight is no suspect.

    Raises:
        StoreError, StoreCorrupt: the journal can't be read.
    """
    totals = journal.totals()
    query = (
        "SELECT key, at_us / 1e6, run_id, coalesce(code, ''), reserved_tokens, reserved_microusd"
        " FROM intents JOIN runs USING (run) WHERE code IS NOT NULL OR ending <> '' OR NOT ?"
        " ORDER BY attempt_id"
    )
    with journal.reading() as connection:
        suspects = tuple(PossiblyBilledAttempt(*row) for row in connection.execute(query, (alive,)))
    return Bill(totals.answers + totals.paid_twice, totals.cost_microusd, suspects)

"""Compute what a store's answers cost and which attempts may have been charged without an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from harvester.config.budget_spans import BudgetSpan
from harvester.store import paths
from harvester.store.journal import spending
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import PossiblyBilledAttempt


@dataclass(frozen=True, slots=True)
class Bill:
    """What a store has cost so far.

    Attributes:
        billed: paid answers, including those that were not stored because their key was held already.
        billed_microusd: their cost in millionths of a dollar.
        possibly_billed: attempts that may have been charged without an answer.
    """

    billed: int
    billed_microusd: int
    possibly_billed: tuple[PossiblyBilledAttempt, ...]

    @property
    def possibly_billed_microusd(self) -> int:
        """Return the sum that was reserved for the possibly billed attempts."""
        return sum(attempt.reserved_microusd for attempt in self.possibly_billed)


def compute_bill(journal: Journal, *, alive: bool) -> Bill:
    """Compute the bill of a store.

    Args:
        alive: whether its process is alive; then attempts in flight are left out.

    Raises:
        StoreError, StoreCorrupt: the journal can't be read.
    """
    totals = journal.totals()
    attempts = tuple(journal.possibly_billed(in_flight=not alive))
    return Bill(totals.answers + totals.paid_twice, totals.cost_microusd, attempts)


def compute_canary_bill(store: Path, *, alive: bool) -> Bill | None:
    """Compute the bill of the canary store inside a store; None where no canary was ever asked.

    Raises:
        StoreError, StoreCorrupt: its journal can't be read.
    """
    if not (store / paths.CANARY / paths.JOURNAL).exists():
        return None
    with Journal.open(store / paths.CANARY, read_only=True) as journal:
        return compute_bill(journal, alive=alive)


def compute_spent(journal: Journal, wall: float, teacher_id: str = "") -> dict[BudgetSpan, spending.Amounts]:
    """Return the tokens and micro-dollars that budgets were charged in each span, canaries included.

    Args:
        journal: of the store. Its folder is where the canary store is looked for.
        wall: now, in Unix seconds.
        teacher_id: of the run that begins or has begun. The teacher's last runs count as part of it if they
            were killed.

    Raises:
        StoreError, StoreCorrupt: a journal can't be read.
    """
    folder = journal.path.parent
    with contextlib.ExitStack() as stack:
        journals = [journal]
        if (folder / paths.CANARY / paths.JOURNAL).exists():
            journals.append(stack.enter_context(Journal.open(folder / paths.CANARY, read_only=True)))
        with journal.reading() as connection:
            run_ids = spending.runs_to_continue(connection, teacher_id)

        def spent(since: float | None, of_runs: Collection[str] | None = None) -> spending.Amounts:
            tokens = microusd = 0
            for each in journals:
                with each.reading() as connection:
                    amounts = spending.spent(connection, since=since, run_ids=of_runs)
                tokens, microusd = tokens + amounts[0], microusd + amounts[1]
            return tokens, microusd

        return {
            BudgetSpan.RUN: spent(None, run_ids),
            BudgetSpan.STORE: spent(None),
            BudgetSpan.DAY: spent(BudgetSpan.DAY.start(wall)),
            BudgetSpan.MONTH: spent(BudgetSpan.MONTH.start(wall)),
        }

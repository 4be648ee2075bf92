"""Compute what a store's answers cost and which attempts may have been charged without an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
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


def compute_spent(
    journal: Journal, wall: float, teacher_id: str = "", since: float | None = None
) -> dict[BudgetSpan, spending.Amounts]:
    """Return the tokens and micro-dollars that budgets were charged in each span, canaries included.

    Args:
        journal: of the store. Its folder is where the canary store is looked for.
        wall: now, in Unix seconds.
        teacher_id: of the run that begins or has begun. The teacher's last runs count as part of it if they
            were killed.
        since: its runs that began then or later, or ended after it, count as part of it too, in Unix seconds.

    Raises:
        StoreError, StoreCorrupt: a journal can't be read.
    """
    with journal.reading() as connection:
        run_ids = spending.runs_to_continue(connection, teacher_id, since)
    with _with_canaries(journal) as journals:
        return {
            BudgetSpan.RUN: _sum_of(journals, None, run_ids),
            BudgetSpan.STORE: _sum_of(journals, None),
            BudgetSpan.DAY: _sum_of(journals, BudgetSpan.DAY.start(wall)),
            BudgetSpan.MONTH: _sum_of(journals, BudgetSpan.MONTH.start(wall)),
        }


def compute_spent_up_to(journal: Journal, run_id: str) -> spending.Amounts:
    """Return the tokens and micro-dollars that budgets were charged by a run, canaries included.

    What runs directly before it spent that were killed counts as part of it (`spending.runs_up_to`).

    Raises:
        StoreError, StoreCorrupt: a journal can't be read.
    """
    with journal.reading() as connection:
        run_ids = spending.runs_up_to(connection, run_id)
    with _with_canaries(journal) as journals:
        return _sum_of(journals, None, run_ids)


@contextlib.contextmanager
def _with_canaries(journal: Journal) -> Iterator[list[Journal]]:
    """Yield the journal of a store, and that of the canary store inside it, if there is one."""
    folder = journal.path.parent / paths.CANARY
    with contextlib.ExitStack() as stack:
        journals = [journal]
        if (folder / paths.JOURNAL).exists():
            journals.append(stack.enter_context(Journal.open(folder, read_only=True)))
        yield journals


def _sum_of(
    journals: Sequence[Journal], since: float | None, run_ids: Collection[str] | None = None
) -> spending.Amounts:
    tokens = microusd = 0
    for journal in journals:
        with journal.reading() as connection:
            amounts = spending.spent(connection, since=since, run_ids=run_ids)
        tokens, microusd = tokens + amounts[0], microusd + amounts[1]
    return tokens, microusd

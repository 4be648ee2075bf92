"""Verify a store with its canary store, repair both on request, and report findings and costs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.errors import StoreError
from harvester.store import paths
from harvester.store.journal.batches import WaitingBatches, waiting_in_batches
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held
from harvester.store.maintain.bill import Bill, compute_bill
from harvester.store.maintain.repair import RepairResult, repair_store
from harvester.store.reader import Corpus
from harvester.store.verify import (
    Finding,
    FindingKind,
    NotReadableError,
    count_readable_rows,
    has_lost_journal,
    require_readable,
    verify_copy,
)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `harvester verify` found.

    Attributes:
        answers: answers held, sealed and journalled, without those of the canary store.
        findings: faults of the store that are left.
        canary_findings: faults of the canary store that are left.
        bill: what the answers cost; empty where the journal can't be read.
        repaired: what a repair did before this, None where none was asked for.
        has_journal: whether the journal could be read; without it only the rows of shards are counted.
        waiting: batches that have not ended, and what they may cost.
    """

    answers: int
    findings: tuple[Finding, ...]
    canary_findings: tuple[Finding, ...]
    bill: Bill
    repaired: RepairResult | None
    has_journal: bool = True
    waiting: WaitingBatches = field(default_factory=WaitingBatches)

    @property
    def remedy(self) -> str:
        """Return what helps against the findings that are left."""
        if self.has_journal and self.repaired is None:
            return "`harvester verify PATH --repair`"
        if self.has_journal:
            return (
                "--repair can't fix the remaining findings: restore journal.db from a backup, or go on "
                "without what they name"
            )
        if self.findings and self.findings[-1].kind is FindingKind.MISSING:
            return (
                "put journal.db back from a copy: without it nothing says which answers belong together, and"
                " --repair can't make a new one. The shards stay readable as they are: export, curate"
            )
        return "`harvester verify PATH --repair` copies what can be read of it; restore it from a copy if not"

    @property
    def messages(self) -> list[str]:
        """Return one line for each finding; those of the canary store begin with its folder."""
        canaries = [f"{paths.CANARY}: {finding}" for finding in self.canary_findings]
        return [str(finding) for finding in self.findings] + canaries

    def facts(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        repaired = {} if self.repaired is None else {"repaired": self.repaired.facts()}
        return {
            **repaired,
            "answers": self.answers,
            "findings": self.messages,
            "billed": self.bill.billed,
            "billed_microusd": self.bill.billed_microusd,
            "possibly_billed": [attempt.facts() for attempt in self.bill.possibly_billed],
            "possibly_billed_microusd": self.bill.possibly_billed_microusd,
            "batches": self.waiting.facts(),
        }


def verify_with_bill(store: Path, *, repair: bool) -> VerifyReport:
    """Verify a store and its canary store, after a repair of both where `repair` is set.

    Raises:
        StoreLocked: a repair needs the store for itself.
        StoreError, StoreCorrupt, StoreFormatError: there is no store here, or it can't be read or repaired.
    """
    repaired = repair_store(store) if repair else None
    findings, answers, has_journal = _verify(store)
    bill, waiting = Bill(0, 0, ()), WaitingBatches()
    if (store / paths.JOURNAL).exists() and not any(paths.JOURNAL in str(finding) for finding in findings):
        with closing(Journal.open(store, read_only=True)) as journal:
            bill = compute_bill(journal, alive=is_held(store))
            with journal.reading() as connection:
                waiting = waiting_in_batches(connection)
    canary_findings: tuple[Finding, ...] = ()
    canary = store / paths.CANARY
    if (canary / paths.JOURNAL).exists() or has_lost_journal(canary):
        canary_findings, _, _ = _verify(canary)
    return VerifyReport(answers, findings, canary_findings, bill, repaired, has_journal, waiting)


def _verify(store: Path) -> tuple[tuple[Finding, ...], int, bool]:
    """Return every finding, the number of answers, and whether a journal was read where one belongs.

    A store that can't be opened is a finding too; then the rows of its readable shards are counted.

    Raises:
        StoreError: there is no store and no answers here, or this user may not read it, which is no damage.
    """
    try:
        corpus = Corpus.open(store, is_damaged=True)
        return tuple(corpus.verify()), corpus.count(), not has_lost_journal(store)
    except NotReadableError:
        raise
    except StoreError as error:
        folder = store / paths.SHARDS if (store / paths.SHARDS).is_dir() else store
        journal = store / paths.JOURNAL
        if journal.exists():
            require_readable(journal)
            rows = count_readable_rows(folder)
            # A repair copies rows out of a damaged journal; out of an empty one it can't.
            kind = FindingKind.DAMAGED if journal.stat().st_size or not rows else FindingKind.MISSING
            return (Finding(kind=kind, place=paths.JOURNAL, message=error.message),), rows, False
        findings = verify_copy(folder)
        if has_lost_journal(store):
            findings.append(Finding(kind=FindingKind.MISSING, place=paths.JOURNAL, message=error.message))
        if not findings:
            raise
        return tuple(findings), count_readable_rows(folder), not has_lost_journal(store)

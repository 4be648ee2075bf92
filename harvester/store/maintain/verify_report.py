"""Verify a store with its canary store, repair both on request, and report findings and costs."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.errors import StoreError
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held
from harvester.store.maintain.bill import Bill, compute_bill
from harvester.store.maintain.repair import RepairResult, repair_store
from harvester.store.reader import Corpus
from harvester.store.verify import Finding, FindingKind, has_lost_journal, verify_copy


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `harvester verify` found.

    Attributes:
        answers: answers held, sealed and journalled, without those of the canary store.
        findings: faults of the store that are left.
        canary_findings: faults of the canary store that are left.
        bill: what the answers cost; empty where the journal can't be read.
        repaired: what a repair did before this, None where none was asked for.
    """

    answers: int
    findings: tuple[Finding, ...]
    canary_findings: tuple[Finding, ...]
    bill: Bill
    repaired: RepairResult | None

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
        }


def verify_with_bill(store: Path, *, repair: bool) -> VerifyReport:
    """Verify a store and its canary store, after a repair of both where `repair` is set.

    Raises:
        StoreLocked: a repair needs the store for itself.
        StoreError, StoreCorrupt, StoreFormatError: there is no store here, or it can't be read or repaired.
    """
    repaired = repair_store(store) if repair else None
    findings, answers = _verify(store)
    bill = Bill(0, 0, ())
    if (store / paths.JOURNAL).exists() and not any(paths.JOURNAL in str(finding) for finding in findings):
        with closing(Journal.open(store, read_only=True)) as journal:
            bill = compute_bill(journal, alive=is_held(store))
    canary_findings: tuple[Finding, ...] = ()
    canary = store / paths.CANARY
    if (canary / paths.JOURNAL).exists() or has_lost_journal(canary):
        canary_findings, _ = _verify(canary)
    return VerifyReport(answers, findings, canary_findings, bill, repaired)


def _verify(store: Path) -> tuple[tuple[Finding, ...], int]:
    """Return every finding and the number of answers; a store that can't be opened is a finding too.

    Raises:
        StoreError: there is no store and no answers here.
    """
    try:
        corpus = Corpus.open(store, is_damaged=True)
        return tuple(corpus.verify()), corpus.count()
    except StoreError as error:
        if (store / paths.JOURNAL).exists():
            return (Finding(kind=FindingKind.DAMAGED, place=paths.JOURNAL, message=error.message),), 0
        folder = store / paths.SHARDS if (store / paths.SHARDS).is_dir() else store
        findings = verify_copy(folder)
        if has_lost_journal(store):
            findings.append(Finding(kind=FindingKind.MISSING, place=paths.JOURNAL, message=error.message))
        if not findings:
            raise
        return tuple(findings), 0

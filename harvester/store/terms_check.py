"""Re-check the terms before sealing and export, using the lineage stored with the rows.

The first check (before a request is sent) is in `run.prepare`, the last one (training) in the trainer. Terms
may have changed or expired since the harvest; a refusal here leaves every answer where it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harvester.errors import TermsRefused
from harvester.store.journal import sqlite
from harvester.system.counted import first_few
from harvester.terms import gate, lineage
from harvester.terms.gate import RecordedTerms, Use, Verdict

if TYPE_CHECKING:
    from harvester.store.reader import Corpus


def require_permitted(corpus: Corpus, use: Use, *beside: Path) -> None:
    """Do nothing when the lineage of every row permits this use today.

    Args:
        beside: folders from which own records and permissions are looked for; see `terms.places`.

    Raises:
        TermsRefused: exit 77; names record, gist, URL, day seen, and the remedies.
    """
    lineages = corpus.lineages(sealed=use != "seal")
    facts = corpus.distinct(lineage.FACT_COLUMNS, sealed=use != "seal")
    if not lineages and not facts:  # there are no rows
        return
    verdicts = gate.judge_lineages(RecordedTerms.load(*beside), lineages, facts, use=use)
    if (refusal := Verdict.of_all(verdicts)) is not None:
        refusal.require()


def require_unsealed_permitted(store: Path) -> None:
    """Check the terms for answers that an earlier run left unsealed: the next run would seal them.

    Raises:
        TermsRefused: as `require_permitted`; no request was sent.
    """
    if sqlite.has_journal(store):
        from harvester.store.reader import Corpus

        require_permitted(Corpus.open(store), "seal", store.resolve().parent)


def require_lineage(corpus: Corpus) -> None:
    """Do nothing when the lineage of every row is present and agrees with the row.

    Raises:
        TermsRefused: exit 77.
    """
    disagreements = lineage.disagreements(corpus.lineages(), corpus.distinct(lineage.FACT_COLUMNS))
    if disagreements:
        raise TermsRefused(
            f"the rows' lineage is missing or contradicts them: {first_few(disagreements)}",
            place=str(corpus.folder),
            remedy="take the shards as the harvester wrote them; a hand-made file has no lineage",
        )

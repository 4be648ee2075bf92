"""Ask the terms before rows leave this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from harvester.terms import gate
from harvester.terms.gate import RecordedTerms, Verdict
from harvester.terms.lineage import Fact, Lineage


def require_publishable(
    lineages: Sequence[Lineage], facts: Sequence[Fact], *beside: Path, use: Literal["keep", "export"]
) -> None:
    """Do nothing when the terms of all rows permit to publish them today.

    Args:
        lineages, facts: of the rows; see `terms.lineage`.
        beside: folders from which own records and permissions are looked for.
        use: "keep": in storage of one's own, where rows for evaluation may lie if they may be harvested.
            "export": for others to train on, where rows for evaluation never go.

    Raises:
        TermsRefused: exit 77; the terms do not permit it, or rows lack a lineage that shows which apply.
    """
    if not lineages and not facts:
        return
    terms = RecordedTerms.load(*beside)
    kept = [lineage for lineage in lineages if use == "keep" and lineage.purpose == "eval"]
    kept_runs = {lineage.run_id for lineage in kept}
    others = [lineage for lineage in lineages if lineage not in kept]
    of_kept = [fact for fact in facts if fact["run_id"] in kept_runs]
    of_others = [fact for fact in facts if fact["run_id"] not in kept_runs]
    verdicts: list[Verdict] = []
    if kept:
        verdicts += gate.judge_lineages(terms, kept, of_kept, use="seal")
    if others or of_others:
        verdicts += gate.judge_lineages(terms, others, of_others, use="export")
    if (refusal := Verdict.of_all(verdicts)) is not None:
        refusal.require()

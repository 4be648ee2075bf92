"""Check the terms of a corpus before it is learned from, and again before a student is exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from harvester.terms import gate
from harvester.terms.lineage import Lineage
from harvester.terms.obligations import DerivedModel
from trainer.config import TrainConfig
from trainer.provenance.student_facts import base_name


def require_permission(
    config: TrainConfig,
    lineages: Sequence[Lineage],
    facts: Sequence[Mapping[str, Any]],
    *,
    use: Literal["train", "export"] = "train",
) -> gate.Verdict:
    """Ask the recorded terms again, today, for this student.

    Folders beside train.toml count as they do beside harvest.toml: `terms` overlays the registry,
    `permissions` holds recorded ones.

    Args:
        lineages: of the corpus, one a run.
        facts: what the rows say of themselves (`harvester.provenance`); rows without a lineage, or whose
            lineage says otherwise, are refused.

    Raises:
        TermsRefused: exit 77; unknown, expired, evaluation-only or unpaid duties mean no.
    """
    student = DerivedModel(
        base=base_name(config.base),  # not its path: a parent folder's name proves nothing
        name=config.name,
        licence=config.out.licence or None,
    )
    verdict = gate.allows_training(
        gate.RecordedTerms.load(config.root),
        lineages,
        student=student,
        use=use,
        facts=facts,
    )
    verdict.require()
    return verdict

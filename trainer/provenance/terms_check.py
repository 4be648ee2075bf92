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
    """Refuse a corpus whose recorded terms, as of today, do not permit this student.

    The folders `terms` and `permissions` beside train.toml are read as they are beside harvest.toml: the
    first adds to the registry, the second holds recorded permissions.

    Args:
        lineages: of the corpus, one for each run.
        facts: distinct values of `harvester.terms.lineage.FACT_COLUMNS` in the rows. Rows without a lineage,
            or that contradict it, are refused.

    Raises:
        TermsRefused: exit 77; the terms are unknown, expired or evaluation-only, or a duty is not met.
    """
    student = DerivedModel(
        base=base_name(config.base),  # not its path: a parent folder's name proves nothing
        name=config.name,
        licence=config.out.licence or None,
    )
    verdict = gate.allows_training(
        gate.RecordedTerms.load(config.root, config.corpus.parent),
        lineages,
        student=student,
        use=use,
        facts=facts,
    )
    verdict.require()
    return verdict

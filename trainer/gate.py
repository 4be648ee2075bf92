"""The second and third door of the terms: before a corpus is learned from, and before a student leaves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from harvester import terms
from trainer.config import TrainConfig


def ask(
    config: TrainConfig,
    lineages: Sequence[Mapping[str, Any]],
    runs: Collection[str],
    *,
    use: Literal["train", "export"] = "train",
) -> terms.Verdict:
    """Ask the recorded terms again, today, for this student.

    Folders beside train.toml count as they do beside harvest.toml: `terms` overlays the registry,
    `permissions` holds recorded ones.

    Args:
        lineages: of the corpus, one a run.
        runs: runs whose rows are at hand. Rows of a run without a lineage stand for an unknown teacher.

    Raises:
        TermsRefused: exit 77; unknown, expired, evaluation-only or unpaid duties mean no.
    """
    known = {str(lineage.get("run_id", "")) for lineage in lineages}
    unknown = [{"teacher_id": f"run {run!r}"} for run in sorted(set(runs) - known)]
    verdict = terms.allows_training(
        [*lineages, *unknown],
        registry=terms.load_registry(config.root / "terms"),
        today=datetime.now(UTC).date(),
        student_base=str(config.base),
        student_name=config.name,
        student_licence=config.out.licence or None,
        permissions=terms.load_permissions(config.root / "permissions"),
        use=use,
    )
    verdict.require()
    return verdict

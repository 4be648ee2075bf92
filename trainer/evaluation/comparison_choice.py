"""Choose how answers are compared with references where train.toml has no `[verify]`.

The teacher's own answers decide, task by task: where the teacher answers "The capital of Ghana is Accra." to
the reference "Accra", equality can't judge anybody. The student's answers have no influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from harvester.quality.verifiers.settings import EVERY_TASK, VerifierSection, VerifySection
from harvester.quality.verifiers.verifiers import Candidate
from trainer.evaluation import text_metrics

# The comparisons, strictest first. Their names are those of verifiers and of metrics.
COMPARISONS = ("exact", "normalised", "choice", "numeric", "contains")
# The strictest comparison is taken that passes this share of what the most lenient one passes.
_ENOUGH = 0.95


def choose(candidates: Iterable[Candidate]) -> VerifySection:
    """Return the verifiers for answers that have a reference.

    Args:
        candidates: the teacher's first answers to the prompts that will be judged.
    """
    metrics = text_metrics.available_metrics()
    # By task, how many answers pass each comparison that applies to all of its references so far.
    by_task: dict[str, dict[str, int]] = {}
    for candidate in candidates:
        if candidate.reference is not None and candidate.text is not None and candidate.outcome == "ok":
            passed = by_task.setdefault(candidate.task or EVERY_TASK, dict.fromkeys(COMPARISONS, 0))
            for kind in list(passed):
                value = metrics[kind](candidate.text, candidate.reference)
                if value is None:
                    del passed[kind]
                else:
                    passed[kind] += value == 1.0
    kinds: Mapping[str, str] = {task: _strictest(passed) for task, passed in sorted(by_task.items())}
    table = {EVERY_TASK: "exact", **kinds}
    options: dict[str, dict[str, str | float]] = {
        "choice": {"choices": text_metrics.LETTERS},
        "numeric": {"relative": text_metrics.NUMBER_TOLERANCE},
    }
    return {
        task: VerifierSection.model_validate({"kind": kind, **options.get(kind, {})})
        for task, kind in table.items()
    }


def _strictest(passed: Mapping[str, int]) -> str:
    most = max(passed.values())
    return next(kind for kind, count in passed.items() if count >= _ENOUGH * most)

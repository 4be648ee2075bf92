"""Compute pass@k, the chance that at least one of k answers to a prompt passes its verifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from harvester.quality.verifiers.verifiers import AnswerVerdict, Judgement
from harvester.system.command_line.text_table import aligned


def pass_at(k: int, judged: int, passed: int) -> float:
    """Return the unbiased estimate of pass@k from n answers of which c passed: 1 - C(n-c, k) / C(n, k).

    From Chen et al. 2021 (arXiv 2107.03374), equation 1, as the product that avoids large numbers. The n
    answers must be independent, and their number must not depend on how many passed.

    Args:
        k: from 1 to `judged`.
        judged: n, answers that passed or failed.
        passed: c, from 0 to `judged`.

    Raises:
        ValueError: the numbers don't fit.
    """
    if not (1 <= k <= judged and 0 <= passed <= judged):
        raise ValueError(f"pass@{k} of {passed} passed among {judged} answers is not defined")
    miss = 1.0
    for size in range(judged - passed + 1, judged + 1):
        miss *= 1 - k / size if size > k else 0.0
    return 1.0 - miss


@dataclass(slots=True)
class TaskTally:
    """Verdicts of one task: counts by verdict and by reason, and for each prompt [passed, failed]."""

    verdicts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AnswerVerdict, 0))
    reasons: dict[str, int] = field(default_factory=dict)
    by_prompt: dict[str, list[int]] = field(default_factory=dict)

    def add(self, prompt_id: str, judgement: Judgement) -> None:
        """Count one answer."""
        self.verdicts[judgement.verdict] += 1
        self.reasons[judgement.reason] = self.reasons.get(judgement.reason, 0) + 1
        counts = self.by_prompt.setdefault(prompt_id, [0, 0])
        if judgement.verdict != AnswerVerdict.UNVERIFIABLE:
            counts[judgement.verdict == AnswerVerdict.FAILED] += 1

    def facts(self, ks: Sequence[int] = ()) -> dict[str, object]:
        """Return counts and pass rates as plain values.

        Args:
            ks: which pass@k; none: 1, and the number of judged answers that each verifiable prompt has.
        """
        judged = [(passed + failed, passed) for passed, failed in self.by_prompt.values() if passed + failed]
        smallest = min((answers for answers, _ in judged), default=0)
        wanted = sorted(set(ks or (1, smallest)) - {0})
        return {
            "prompts": len(self.by_prompt),
            "answers": sum(self.verdicts.values()),
            **{str(verdict): count for verdict, count in self.verdicts.items()},
            "reasons": {str(reason): count for reason, count in sorted(self.reasons.items())},
            "pass_at": {str(k): _mean_pass_at(k, judged) for k in wanted},
        }


def _mean_pass_at(k: int, judged: Iterable[tuple[int, int]]) -> dict[str, float | int | None]:
    """Mean of pass@k over the prompts with at least k judged answers; None without such a prompt."""
    values = [pass_at(k, answers, passed) for answers, passed in judged if answers >= k]
    return {"value": sum(values) / len(values) if values else None, "prompts": len(values)}


def table_lines(tasks: Mapping[str, TaskTally], ks: Sequence[int] = ()) -> list[str]:
    """Return a table of the tasks as lines of text, and below it why answers could not be verified."""
    heading = ("task", "prompts", "answers", "passed", "failed", "unverifiable", "pass rates")
    rows: list[tuple[str, ...]] = [heading]
    notes = []
    for task, tally in sorted(tasks.items()):
        facts = tally.facts(ks)
        rates = facts["pass_at"]
        assert isinstance(rates, dict)
        shown = [
            f"pass@{k} {rate['value']:.3f}" if rate["value"] is not None else f"pass@{k} -"
            for k, rate in rates.items()
        ]
        counts = [f"{facts[name]:,}" for name in heading[1:6]]
        rows.append((task, *counts, "  ".join(shown) or "-"))
        notes += [
            f"  {task}: {count:,} answers: {reason}"
            for reason, count in sorted(tally.reasons.items())
            if reason not in {"correct", "wrong"}
        ]
    return aligned(rows, left={0, len(heading) - 1}) + notes

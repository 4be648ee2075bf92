"""Filters that compare the answers of a prompt: agreement between samples, and difficulty.

They look at all rows first. In memory they hold a few numbers for each prompt.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict

from harvester.export.drops import Drop
from harvester.export.score import candidate_of
from harvester.quality.similarity.texts import normalised
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from harvester.store.shards.schema import Sample


class Agreement:
    """Drops answers that too few of the prompt's usable answers agree with.

    Answers agree if they are equal but for Unicode form, case and space. A prompt with one answer is kept.

    Args:
        least: least share of the prompt's answers, the row's own among them, that must agree.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self._answers: defaultdict[str, Counter[bytes]] = defaultdict(Counter)

    def observe(self, sample: Sample) -> None:
        """Count an answer of its prompt."""
        if sample.outcome == "ok":
            self._answers[sample.prompt_id][_digest(sample)] += 1

    def __call__(self, sample: Sample) -> Drop | None:
        """Drop an answer that too few agree with."""
        counts = self._answers[sample.prompt_id]
        total = counts.total()
        if total < 2:
            return None
        share = counts[_digest(sample)] / total
        return Drop("disagrees", f"{share:.0%} of {total} answers") if share < self._least else None


class Difficulty:
    """Drops rows of prompts that are too easy or too hard, by the share of answers that pass `[verify]`.

    Prompts of which no answer can be verified are kept.

    Args:
        least, most: limits of the pass rate, 0 to 1.
    """

    def __init__(self, least: float, most: float, verifiers: Verifiers) -> None:
        self._least, self._most = least, most
        self._verifiers = verifiers
        self._verdicts: defaultdict[str, Counter[AnswerVerdict]] = defaultdict(Counter)

    def observe(self, sample: Sample) -> None:
        """Judge an answer."""
        self._verdicts[sample.prompt_id][self._verifiers.judge(candidate_of(sample)).verdict] += 1

    def __call__(self, sample: Sample) -> Drop | None:
        """Drop a row whose prompt is too easy or too hard."""
        verdicts = self._verdicts[sample.prompt_id]
        judged = verdicts[AnswerVerdict.PASSED] + verdicts[AnswerVerdict.FAILED]
        if not judged:
            return None
        rate = verdicts[AnswerVerdict.PASSED] / judged
        if self._least <= rate <= self._most:
            return None
        return Drop("too_hard" if rate < self._least else "too_easy", f"{rate:.0%} of {judged} answers pass")


def _digest(sample: Sample) -> bytes:
    text = normalised(sample.completion or "").encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).digest()

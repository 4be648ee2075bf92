"""Choose the mock teacher's answers: right by rule, or wrong with a configured probability.

Whether an answer is wrong, and which wrong one it is, is a pure function of the server's seed, the
task, the prompt text and, above temperature 0, the sample (request body, its `seed` or else how often
this body was answered before, choice index). At temperature 0 the same prompt always gets the same
answer. So the teacher makes real errors, which are known and repeatable.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from harvester.mock_teacher.occurrences import Occurrences
from harvester.mock_teacher.settings import EVERY_TASK
from harvester.mock_teacher.tasks.judging import Preference, biased_verdict
from harvester.mock_teacher.tasks.rules import JUDGE, Solved, solve, wrong_answer
from harvester.mock_teacher.wire import ChatRequest

UNKNOWN_TASK = "I do not know this task."
# Longest prompt whose solution is cached, in characters.
_CACHED_CHARS = 4096
_UNIT = 2.0**64

_solve_short = lru_cache(maxsize=16_384)(solve)


@dataclass(frozen=True, slots=True)
class MockAnswer:
    """The text of one choice.

    Attributes:
        task: the rule task, None if the prompt is none.
        right: whether the text is the right answer, None if the prompt is no rule task.
        digest: 32 bytes that seed other random values of this choice, such as log-probabilities.
    """

    text: str
    task: str | None
    right: bool | None
    digest: bytes


class Answerer:
    """Choose answers. The only state is how often a body was answered at a temperature above 0."""

    def __init__(
        self, seed: int, accuracy: Mapping[str, float], prefers: Preference = Preference.RIGHT
    ) -> None:
        self._seed = seed
        self._accuracy = accuracy
        self._prefers = prefers
        self._occurrences = Occurrences()

    def answers(self, ask: ChatRequest) -> list[MockAnswer]:
        """Return the `n` answers to a request."""
        solved = _solve_short(ask.text) if len(ask.text) <= _CACHED_CHARS else solve(ask.text)
        return [self._answer(ask, solved, choice) for choice in range(ask.n)]

    def note_answered(self, ask: ChatRequest) -> None:
        """Count an answer, so that the next equal request above temperature 0 gets another sample."""
        self._occurrences.note(ask)

    def _answer(self, ask: ChatRequest, solved: Solved | None, choice: int) -> MockAnswer:
        if (biased := biased_verdict(ask.text, self._prefers)) is not None:
            return MockAnswer(biased, JUDGE, None, ask.body_sha256)
        task = solved.task if solved else ""
        digest = hashlib.sha256(f"{self._seed}\0{task}\0".encode() + ask.prompt_sha256)
        if ask.temperature > 0:
            # The body already holds the request's seed, if there is one.
            occurrence = self._occurrences.of(ask)
            digest.update(ask.body_sha256 + f"\0{occurrence}\0{choice}".encode())
        chance = digest.digest()
        if solved is None:
            return MockAnswer(UNKNOWN_TASK, None, None, chance)
        share = self._accuracy.get(task, self._accuracy.get(EVERY_TASK, 1.0))
        if int.from_bytes(chance[:8]) / _UNIT < share:
            return MockAnswer(solved.answer, task, True, chance)
        wrong = wrong_answer(solved, random.Random(chance[8:]))
        return MockAnswer(wrong, task, False, chance)

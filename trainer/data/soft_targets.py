"""Turn a teacher's log-probabilities into soft targets for a student's tokens. Loads no torch.

Teacher and student tokens are compared by their bytes, never by id or by the size of a vocabulary. A position
of the student gets a soft target where its token begins at a byte at which a teacher's token begins, too (an
anchor). There the probability of each listed teacher token goes to a student token:

- If all answers have the same token boundaries in both tokenizers, and every listed token has the bytes of
  exactly one student token, it goes to that token (path "ids").
- Otherwise it goes to the token with these bytes, else to the first token of these bytes encoded alone (path
  "bytes"). A student token that is longer than the teacher's and begins with it could be meant as well, if it
  occurs in the answers and the teacher has no such token; then `token_paths` follows the teacher's tokens.
- Control tokens are mapped by their role, the end of the turn; all others go to the tail.

Positions without a soft target are learned by cross-entropy alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.data.chat_template import Example, Renderer
from trainer.data.student_tokens import StudentTokens, ambiguous_bytes
from trainer.data.teacher_tokens import NOTHING, TeacherSignal, TokenTable
from trainer.data.token_alignment import Alignment, TeacherText, align
from trainer.data.token_mapping import CERTAIN, TokenMapping

Path = Literal["ids", "bytes"]
Numbers = npt.NDArray[np.int32]

# What isn't used, as it is counted.
UNLISTED_ENDS = "ends of the turn that the teacher's server doesn't list"

# Least share of the supervised tokens with a soft target, and of the listed probability that reaches a
# student token. Below it most of the loss would be another one than the operator asked for.
LEAST_COVERAGE = 0.6
# Share of soft targets that say nothing beyond the answers from which on this is noted.
MOST_CERTAIN = 0.99


@dataclass(frozen=True, slots=True)
class SoftReport:
    """Say how much of a corpus's log-probabilities a student can learn from.

    Attributes:
        path: how teacher tokens are mapped to student tokens.
        rows, rows_without: learned rows with and without log-probabilities.
        supervised: supervised tokens of the rows with log-probabilities, without ends of the turn that the
            teacher's server doesn't list.
        anchors: those of them that have a soft target.
        mapped_mass: share of the listed probability that reached a student token, at the anchors.
        counts: what couldn't be used, by reason; and under `CERTAIN` what says nothing beyond the answers.
        sampling: rows by the sampling settings of their requests.
    """

    path: Path
    rows: int
    rows_without: int
    supervised: int
    anchors: int
    mapped_mass: float
    counts: Mapping[str, int] = field(default_factory=dict)
    sampling: Mapping[str, int] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the supervised tokens of rows with log-probabilities that have a soft target."""
        return self.anchors / self.supervised if self.supervised else 0.0

    def __str__(self) -> str:
        """Describe coverage in one line."""
        if not self.rows:
            return "soft targets: no row has log-probabilities, so all are learned by cross-entropy alone"
        without = f", {self.rows_without:,} rows have none" if self.rows_without else ""
        return (
            f"soft targets: {self.coverage:.1%} of {self.supervised:,} supervised tokens, "
            f"{self.mapped_mass:.1%} of the listed probability, mapped by {self.path}{without}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for --json."""
        return {**asdict(self), "coverage": self.coverage}

    @property
    def faults(self) -> tuple[str, ...]:
        """Why these log-probabilities can't be learned from; empty if they can, or if there are none."""
        faults = []
        remedy = (
            '; set [train] soft_targets = "off", or take a student whose tokens begin where the teacher\'s do'
        )
        if self.rows and self.coverage < LEAST_COVERAGE:
            faults.append(
                f"soft targets reach {self.coverage:.1%} of the supervised tokens, below "
                f"{LEAST_COVERAGE:.0%}{self._reasons()}{remedy}"
            )
        elif self.rows and self.mapped_mass < LEAST_COVERAGE:
            faults.append(
                f"{self.mapped_mass:.1%} of the listed probability has a student token, below "
                f"{LEAST_COVERAGE:.0%}{self._reasons()}{remedy}"
            )
        return tuple(faults)

    def notes(self) -> list[str]:
        """Return lines for plan and doctor: coverage, what wasn't used, settings that bend probabilities."""
        lines = [str(self)]
        if counted := self._counted():
            lines.append(f"soft targets, not used: {counted}")
        if self.anchors and self.counts.get(CERTAIN, 0) >= MOST_CERTAIN * self.anchors:
            lines.append(
                f"{self.counts[CERTAIN]:,} of {self.anchors:,} soft targets are a log-probability of 0 "
                "without alternatives, as servers write that compute none: they teach what the answers teach"
            )
        bent = {settings: rows for settings, rows in self.sampling.items() if settings}
        if bent:
            settings = "; ".join(f"{rows:,} rows with {name}" for name, rows in sorted(bent.items()))
            lines.append(
                f"log-probabilities were asked for at {settings}: some servers apply these settings to the "
                "log-probabilities that they return"
            )
        return lines

    def _counted(self) -> str:
        unused = sorted((reason, count) for reason, count in self.counts.items() if reason != CERTAIN)
        return ", ".join(f"{count:,} {reason}" for reason, count in unused)

    def _reasons(self) -> str:
        counted = self._counted()
        return f" ({counted})" if counted else ""


def attach(
    examples: Sequence[Example],
    keys: Sequence[str],
    answers: Sequence[TeacherText],
    signal: TeacherSignal,
    renderer: Renderer,
    *,
    path: Path | None = None,
) -> tuple[list[Example], SoftReport]:
    """Add soft targets to the examples whose answers have log-probabilities, and report the coverage.

    Args:
        keys, answers: of each example; the key is "" where it isn't learned.
        path: force a way of mapping; None: by ids where that is possible.
    """
    student = StudentTokens(renderer)
    table = signal.table
    counts: Counter[str] = Counter()
    alignments: dict[int, Alignment] = {}
    for number, (example, key, answer) in enumerate(zip(examples, keys, answers, strict=True)):
        if key in signal.answers:
            alignments[number] = align(example, answer, signal.answers[key], table, student, counts)
    same_spans = path != "bytes" and all(alignment.same_spans for alignment in alignments.values())
    taken, mapped, ambiguous = choose_mapping(
        table,
        student,
        {alignment.end for alignment in alignments.values()} - {NOTHING},
        lambda: {int(i) for n in alignments for i in np.unique(examples[n].ids[examples[n].prompt_length :])},
        same_spans=same_spans,
    )
    mapping = TokenMapping(table, student, mapped, ambiguous, counts)
    result = list(examples)
    for number, alignment in alignments.items():
        soft = mapping.targets(examples[number], signal.answers[keys[number]], alignment)
        result[number] = replace(examples[number], soft=soft)
    learned = [result[number] for number in alignments]
    unlisted = _unlisted_ends(learned, list(alignments.values()), len(student.end_of_turn), counts)
    return result, SoftReport(
        taken,
        rows=len(alignments),
        rows_without=sum(map(bool, keys)) - len(alignments),
        supervised=sum(e.supervised for e in learned) - unlisted,
        anchors=sum(len(e.soft.positions) for e in learned if e.soft is not None),
        mapped_mass=share_of_mass(mapping.mapped, mapping.listed),
        counts=dict(+counts),
        sampling=dict(Counter(signal.answers[keys[number]].sampling for number in alignments)),
    )


def choose_mapping(
    table: TokenTable,
    student: StudentTokens,
    ends: Collection[int],
    used: Callable[[], Collection[int]],
    *,
    same_spans: bool,
) -> tuple[Path, Numbers, set[bytes]]:
    """Choose how teacher tokens are mapped to student tokens, for all answers alike.

    Args:
        ends: teacher tokens that ended an answer.
        used: returns the student's tokens that occur in the answers.
        same_spans: whether all answers have the same token boundaries in both tokenizers.

    Returns:
        The way; [tokens + 1] int32, the student's token of each teacher token; texts that may become a longer
        student token.
    """
    mapped = student.map_by_id(table) if same_spans else None
    taken: Path = "bytes" if mapped is None else "ids"
    ambiguous: set[bytes] = set()
    if mapped is None:
        mapped = student.map_by_bytes(table)
        ambiguous = ambiguous_bytes(table, [student.data[i] for i in set(used()) - student.special])
    student.map_ends(mapped, table, ends)
    return taken, mapped, ambiguous


def share_of_mass(mapped: float, listed: float) -> float:
    """Return the share of the listed probability that was mapped, rounded: sums depend on their order."""
    return round(mapped / listed, 9) if listed else 0.0


def _unlisted_ends(
    examples: Sequence[Example], alignments: Sequence[Alignment], size: int, counts: Counter[str]
) -> int:
    """Count the tokens that end a turn and for which the teacher's server lists no probability.

    Args:
        size: tokens that end a turn of the student; only the first can have a soft target.
        counts: grows by the rows that have none.
    """
    tokens = 0
    for example, alignment in zip(examples, alignments, strict=True):
        if example.terminated:
            is_listed = alignment.end != NOTHING
            counts[UNLISTED_ENDS] += not is_listed
            tokens += size - is_listed
    return tokens

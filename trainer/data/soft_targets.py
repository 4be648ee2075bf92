"""Turn a teacher's log-probabilities into soft targets for a student's tokens. Loads no torch.

Teacher and student tokens are compared by their bytes, never by id or by the size of a vocabulary. A position
of the student gets a soft target where its token begins at a byte at which a teacher's token begins, too (an
anchor). There the probability of each listed teacher token goes to a student token:

- If all answers have the same token boundaries in both tokenizers, and every listed token has the bytes of
  exactly one student token, it goes to that token (path "ids").
- Otherwise it goes to the token with these bytes, else to the first token of these bytes encoded alone (path
  "bytes"). A student token that is longer than the teacher's and begins with it could be meant as well, if it
  occurs in the answers and the teacher has no such token; then the probability goes to the tail.
- Control tokens are mapped by their role, the end of the turn; all others go to the tail.

Positions without a soft target are learned by cross-entropy alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainer.data.chat_template import Example, Renderer, SparseTargets
from trainer.data.student_tokens import StudentTokens, ambiguous_bytes
from trainer.data.teacher_tokens import NOTHING, TeacherSignal, TeacherTokens
from trainer.data.token_alignment import Alignment, TeacherText, align

Path = Literal["ids", "bytes"]
Numbers = npt.NDArray[np.int32]

# Least share of the supervised tokens with a soft target, and of the listed probability that reaches a
# student token. Below it most of the loss would be another one than the operator asked for.
LEAST_COVERAGE = 0.6
# Listed probabilities may sum to this: float16 rounds each of them by up to 0.4 %.
LARGEST_MASS = 1.01
# Below it a probability is 0 in fp64.
SMALLEST_LOG_PROB = -700.0


@dataclass(frozen=True, slots=True)
class SoftReport:
    """Say how much of a corpus's log-probabilities a student can learn from.

    Attributes:
        path: how teacher tokens are mapped to student tokens.
        rows, rows_without: learned rows with and without log-probabilities.
        supervised: supervised tokens of the rows with log-probabilities.
        anchors: those of them that have a soft target.
        mapped_mass: share of the listed probability that reached a student token, at the anchors.
        counts: what couldn't be used, by reason.
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
        if self.counts:
            lines.append(f"soft targets, not used: {self._counted()}")
        bent = {settings: rows for settings, rows in self.sampling.items() if settings}
        if bent:
            settings = "; ".join(f"{rows:,} rows with {name}" for name, rows in sorted(bent.items()))
            lines.append(
                f"log-probabilities were asked for at {settings}: some servers apply these settings to the "
                "log-probabilities that they return"
            )
        return lines

    def _counted(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))

    def _reasons(self) -> str:
        return f" ({self._counted()})" if self.counts else ""


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
        keys, answers: of each example.
        path: force a way of mapping; None: by ids where that is possible.
    """
    student = StudentTokens(renderer)
    table = signal.table
    counts: Counter[str] = Counter()
    alignments: dict[int, Alignment] = {}
    for number, (example, key, answer) in enumerate(zip(examples, keys, answers, strict=True)):
        if key in signal.answers:
            alignments[number] = align(example, answer, signal.answers[key], table, student, counts)
    mapped = None
    if path != "bytes" and all(a.same_spans for a in alignments.values()):
        mapped = student.map_by_id(table)
    taken: Path = "bytes" if mapped is None else "ids"
    if mapped is None:
        used = {int(i) for n in alignments for i in np.unique(examples[n].ids[examples[n].prompt_length :])}
        mapped = student.map_by_bytes(table, ambiguous_bytes(table, [student.data[i] for i in used]))
    ends = {alignment.end for alignment in alignments.values()} - {NOTHING}
    student.map_ends(mapped, table, ends)
    mass = np.zeros(2)
    result = list(examples)
    for number, alignment in alignments.items():
        soft = targets_of(signal.answers[keys[number]], alignment, mapped, counts, mass)
        result[number] = replace(examples[number], soft=soft)
    learned = [result[number] for number in alignments]
    return result, SoftReport(
        taken,
        rows=len(alignments),
        rows_without=len(examples) - len(alignments),
        supervised=sum(e.supervised for e in learned),
        anchors=sum(len(e.soft.positions) for e in learned if e.soft is not None),
        mapped_mass=float(mass[0] / mass[1]) if mass[1] else 0.0,
        counts=dict(+counts),
        sampling=dict(Counter(signal.answers[keys[number]].sampling for number in alignments)),
    )


def targets_of(
    tokens: TeacherTokens,
    alignment: Alignment,
    mapped: Numbers,
    counts: Counter[str],
    mass: npt.NDArray[np.float64],
) -> SparseTargets | None:
    """Return the soft targets of an example; None if it has none.

    The order of the alternatives doesn't matter: a token that is listed twice counts once, with its higher
    probability, and student tokens are sorted by probability.

    Args:
        mapped: student id by teacher token, with one more element for `NOTHING`.
        counts: grows by what can't be used. mass: grows by the mapped and the listed probability.
    """
    numbers = tokens.tokens[alignment.entries]
    row, token, probability = _distinct(numbers, tokens.log_probs[alignment.entries], counts)
    totals = np.bincount(row, probability, minlength=len(numbers))
    counts["positions whose probabilities sum to more than 1"] += int((totals > LARGEST_MASS).sum())
    kept = totals[row] <= LARGEST_MASS
    row, ids, probability = row[kept], mapped[token[kept]], probability[kept]
    known = ids != NOTHING
    counts["alternatives without a student token"] += int((~known).sum())
    places, inverse = np.unique(row[known] * np.int64(1 << 32) + ids[known], return_inverse=True)
    merged = np.zeros(len(places))
    np.add.at(merged, inverse, probability[known])
    row, ids = (places >> 32).astype(np.int64), (places & 0xFFFFFFFF).astype(np.int32)
    mass += merged.sum(), totals[np.unique(row)].sum()
    return _laid_out(row, ids, merged, alignment.positions) if len(row) else None


def _distinct(
    numbers: Numbers, log_probs: npt.NDArray[np.float16], counts: Counter[str]
) -> tuple[npt.NDArray[np.int64], Numbers, npt.NDArray[np.float64]]:
    """Return row, token and probability of the usable entries of [rows, 1 + k], each token of a row once."""
    is_listed = numbers != NOTHING
    has_excess = np.isposinf(log_probs).any(axis=1, keepdims=True)
    is_zero = is_listed & (log_probs < SMALLEST_LOG_PROB)
    counts["log-probabilities that can't be read"] += int(np.isnan(log_probs).sum())
    counts["alternatives without a probability (-inf, -9999)"] += int(is_zero.sum())
    counts["positions with fewer alternatives than others"] += int((~is_listed).any(axis=1).sum())
    counts["positions with a probability above 1"] += int(has_excess.sum())
    row, column = np.nonzero(is_listed & ~is_zero & np.isfinite(log_probs) & ~has_excess)
    token, probability = numbers[row, column], np.exp(log_probs[row, column].astype(np.float64))
    order = np.lexsort((-probability, token, row))
    row, token, probability = row[order], token[order], probability[order]
    is_first = np.ones(len(row), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (token[1:] != token[:-1])
    return row[is_first], token[is_first], probability[is_first]


def _laid_out(
    row: npt.NDArray[np.int64], ids: Numbers, probability: npt.NDArray[np.float64], positions: Numbers
) -> SparseTargets:
    """Lay student tokens out as one line for each position, the likeliest first."""
    order = np.lexsort((ids, -probability, row))
    row, ids, probability = row[order], ids[order], probability[order]
    rows, begins, sizes = np.unique(row, return_index=True, return_counts=True)
    column = np.arange(len(row)) - np.repeat(begins, sizes)
    line = np.repeat(np.arange(len(rows)), sizes)
    all_ids = np.repeat(ids[begins][:, None], int(sizes.max()), axis=1)
    log_probs = np.full(all_ids.shape, -np.inf, dtype=np.float16)
    all_ids[line, column] = ids
    log_probs[line, column] = np.log(probability)
    return SparseTargets(positions[rows], all_ids, log_probs)

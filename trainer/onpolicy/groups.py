"""Compare the tokens of a student's answer with those of a teacher, by bytes. Loads no torch.

Both spell the same text. Where a token of each begins at the same byte, the text is cut; between two cuts
lies a group of tokens of both. With equal tokenizers each group is one token of each. The teacher's
log-probability of a group is the sum over its tokens; it is a lower bound of that of the text, which other
tokens could spell as well. Ends of a turn are compared by their role, whatever their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Servers put sentinels such as -9999 in place of impossible tokens. A probability below e^-30 tells no more.
LEAST_LOGPROB = -30.0
UNSCORED = -1

Floats32 = npt.NDArray[np.float32]
# First byte, byte after the last, and log-probability of a token; None: it is unknown.
TeacherToken = tuple[int, int, float | None]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one answer.

    Attributes:
        of_token: [tokens] int32, group of each token of the student, `UNSCORED` where the teacher's
            log-probability is unknown.
        teacher: [groups] fp32, log-probability that the teacher gives to each group.
        clipped: groups whose log-probability was raised to `LEAST_LOGPROB`.
    """

    of_token: npt.NDArray[np.int32]
    teacher: npt.NDArray[np.float32]
    clipped: int = 0

    @property
    def scored(self) -> int:
        """Tokens of the student that are in a group."""
        return int(np.count_nonzero(self.of_token != UNSCORED))


def unscored(tokens: int) -> Groups:
    """Return the groups of an answer that the teacher did not score."""
    return Groups(np.full(tokens, UNSCORED, dtype=np.int32), np.zeros(0, dtype=np.float32))


def group(
    sizes: Sequence[int],
    teacher: Sequence[TeacherToken],
    *,
    ends: bool = False,
    end_logprob: float | None = None,
) -> Groups:
    """Cut an answer where tokens of both begin.

    Args:
        sizes: bytes of each of the student's tokens, without the one that ends the answer.
        teacher: its tokens that lie in the answer, in order; bytes count from the answer's beginning.
        ends: whether the student ended the answer with a token of its own.
        end_logprob: log-probability that the teacher gives to its own end there; None: it is unknown.
    """
    bounds = np.cumsum([0, *sizes]).tolist()
    starts = {first for first, _, _ in teacher}
    stops = {stop for _, stop, _ in teacher}
    cuts = sorted((starts | stops).intersection(bounds))
    of_token = np.full(len(sizes) + ends, UNSCORED, dtype=np.int32)
    values: list[float] = []
    clipped = 0
    mine = theirs = 0
    for first, stop in itertools.pairwise(cuts):
        while mine < len(sizes) and bounds[mine] < first:
            mine += 1
        while theirs < len(teacher) and teacher[theirs][0] < first:
            theirs += 1
        start, covered, parts = mine, first, []
        while mine < len(sizes) and bounds[mine + 1] <= stop:
            mine += 1
        while theirs < len(teacher) and teacher[theirs][1] <= stop:
            begin, end, value = teacher[theirs]
            parts.append(value if begin == covered else None)  # a gap leaves the group unknown
            covered, theirs = end, theirs + 1
        known = [value for value in parts if value is not None]
        if covered != stop or not parts or len(known) < len(parts) or bounds[start] != first:
            continue
        clipped += sum(known) < LEAST_LOGPROB
        of_token[start:mine] = len(values)
        values.append(max(sum(known), LEAST_LOGPROB))
    if ends and end_logprob is not None:
        clipped += end_logprob < LEAST_LOGPROB
        of_token[-1] = len(values)
        values.append(max(end_logprob, LEAST_LOGPROB))
    return Groups(of_token, np.asarray(values, dtype=np.float32), clipped)


def log_ratios(groups: Groups, student: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return log p_student - log p_teacher of each group.

    Args:
        student: [tokens], the student's log-probability of each of its tokens.
    """
    mine = np.zeros(len(groups.teacher), dtype=np.float64)
    scored = groups.of_token != UNSCORED
    np.add.at(mine, groups.of_token[scored], student[scored].astype(np.float64))
    return mine - groups.teacher


def divergence(groups: Groups, student: Floats32, listed: Floats32) -> float:
    """Return the sum over an answer of what its tokens add to the reverse KL divergence, in nats.

    A token with a listed distribution adds its divergence from it, another group its log-ratio.

    Args:
        student: [tokens], the student's log-probability of each of its tokens.
        listed: [tokens], divergence from the teacher's listed distribution; NaN where there is none. Such a
            token is a group of its own.
    """
    ratios = log_ratios(groups, student)
    known = ~np.isnan(listed)
    ratios[groups.of_token[known]] = listed[known]
    return float(ratios.sum())


def without_mean(groups: Sequence[Groups], values: Sequence[Floats32]) -> list[Floats32]:
    """Return the advantages of a round less their mean over the scored tokens; others stay 0.

    The expected gradient stays, since that of log p_student times a constant is 0 in expectation (Williams
    1992, REINFORCE with a baseline); for a mean of the same answers up to one part in their number.
    """
    masks = [each.of_token != UNSCORED for each in groups]
    scored = np.concatenate([value[mask] for value, mask in zip(values, masks, strict=True)])
    mean = scored.mean(dtype=np.float64)
    return [
        np.where(mask, value - mean, 0.0).astype(np.float32)
        for value, mask in zip(values, masks, strict=True)
    ]


def advantages(
    groups: Groups, student: npt.NDArray[np.float32], most: float | None = None
) -> npt.NDArray[np.float32]:
    """Return the advantage of each token: minus the log-ratio of its group, 0 where nothing is known.

    The gradient of the reverse KL divergence E[log p_student - log p_teacher] over the student's own answers
    is E[(log p_student - log p_teacher) grad log p_student]: a policy gradient whose advantage is minus the
    log-ratio. Only the token's own term is kept, without those of later tokens (discount 0), as in
    "On-Policy Distillation" (Thinking Machines Lab 2025); MiniLLM (Gu et al. 2023, arXiv 2306.08543) and
    GKD (Agarwal et al. 2023, arXiv 2306.13649) minimise the same divergence.

    Args:
        most: bound of its size; None: there is none.
    """
    ratios = log_ratios(groups, student)
    result = np.zeros(len(groups.of_token), dtype=np.float32)
    scored = groups.of_token != UNSCORED
    result[scored] = -ratios[groups.of_token[scored]]
    return result if most is None else result.clip(-most, most)

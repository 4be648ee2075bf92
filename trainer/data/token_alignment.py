"""Find where tokens of a teacher and of a student begin at the same byte of an answer. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.data.chat_template import Example
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import NOTHING, TeacherTokens, TokenTable

Numbers = npt.NDArray[np.int32]

# What can't be aligned, as it is counted.
NOT_BY_BYTES = "rows whose text the student's tokens don't show byte by byte"
INEXACT = "generated tokens without exact bytes"
ANOTHER_TEXT = "rows whose log-probabilities are of another text"
REASONS = (NOT_BY_BYTES, INEXACT, ANOTHER_TEXT)


@dataclass(frozen=True, slots=True)
class TeacherText:
    """The bytes of an answer that the teacher generated: its text, and the reasoning if that is learned.

    Attributes:
        has_reasoning: whether the teacher reasoned, so that its tokens may begin before the answer.
    """

    text: bytes
    thought: bytes = b""
    has_reasoning: bool = False


class Alignment(NamedTuple):
    """Positions of an example at which a student token and a teacher token begin at the same byte.

    Attributes:
        positions: supervised tokens of the example, rising. entries: tokens of the teacher, of equal length.
        same_spans: whether all boundaries agree where the two texts do.
        end: number of the teacher's token that ended the answer; `NOTHING` if it isn't listed.
    """

    positions: Numbers
    entries: Numbers
    same_spans: bool
    end: int


class _Run(NamedTuple):
    """Hold successive teacher tokens with known bytes: the first one's number, and where each begins."""

    first: int
    starts: npt.NDArray[np.int64]
    blob: bytes

    def starts_in(self, begin: int, size: int) -> npt.NDArray[np.int64]:
        """Return the tokens that lie in a part of the bytes; none of those that begin at the same byte."""
        begins, ends = self.starts[:-1], self.starts[1:]
        inside = np.flatnonzero((begins >= begin) & (ends <= begin + size))
        return inside[np.diff(self.starts)[inside] > 0]


def align(
    example: Example,
    answer: TeacherText,
    tokens: TeacherTokens,
    table: TokenTable,
    student: StudentTokens,
    counts: Counter[str],
) -> Alignment:
    """Find the tokens of an example that begin where a token of the teacher begins.

    Args:
        counts: grows by what can't be aligned, by one of `REASONS`.
    """
    ending = len(student.end_of_turn) if example.terminated else 0
    ids = example.ids[example.prompt_length : len(example.ids) - ending].tolist()
    pieces = [student.data[i] for i in ids]
    learned = b"".join(pieces)
    starts = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    text_at = len(learned) - len(answer.text)
    nothing = np.zeros(0, dtype=np.int32)
    if text_at < 0 or learned[text_at:] != answer.text:
        counts[NOT_BY_BYTES] += 1
        return Alignment(nothing, nothing, same_spans=True, end=NOTHING)
    chosen = tokens.tokens[:, 0].tolist()
    runs = _runs([table.data[number] for number in chosen])
    counts[INEXACT] += len(chosen) - sum(len(r.starts) - 1 for r in runs)
    positions, entries, same = [nothing], [nothing], True
    end = NOTHING
    for run, in_run, in_learned, size in _segments(runs, answer, learned, text_at):
        inside = run.starts_in(in_run, size)
        offsets = run.starts[:-1][inside] - in_run + in_learned
        _, mine, theirs = np.intersect1d(starts[:-1], offsets, assume_unique=True, return_indices=True)
        positions.append(mine.astype(np.int32))
        entries.append((run.first + inside[theirs]).astype(np.int32))
        of_student = np.count_nonzero((starts[:-1] >= in_learned) & (starts[:-1] < in_learned + size))
        same = same and of_student == len(offsets) == len(mine)
        last = len(run.starts) - 2  # the run's last token, which may have ended the answer
        is_last = run.first + last == len(chosen) - 1 and in_learned + size == len(learned)
        if is_last and run.starts[last] == in_run + size and table.is_control(chosen[-1]):
            end = chosen[-1]
            if example.terminated:
                positions.append(np.array([len(ids)], dtype=np.int32))
                entries.append(np.array([len(chosen) - 1], dtype=np.int32))
    if not any(map(len, entries)):
        counts[ANOTHER_TEXT] += 1
    at, order = np.unique(np.concatenate(positions), return_index=True)
    return Alignment(at, np.concatenate(entries)[order], same, end)


def _runs(pieces: Sequence[bytes | None]) -> list[_Run]:
    """Split a teacher's tokens where the bytes of one are unknown."""
    runs: list[_Run] = []
    begin = 0
    for at in range(len(pieces) + 1):
        if at < len(pieces) and pieces[at] is not None:
            continue
        known = [piece or b"" for piece in pieces[begin:at]]
        if known:
            runs.append(_Run(begin, np.cumsum([0, *map(len, known)], dtype=np.int64), b"".join(known)))
        begin = at + 1
    return runs


def _segments(
    runs: Sequence[_Run], answer: TeacherText, learned: bytes, text_at: int
) -> Iterator[tuple[_Run, int, int, int]]:
    """Yield parts of the learned text that the teacher's tokens spell, in order.

    Each is a run, the first byte in it, the first byte in `learned`, and the number of bytes.
    """
    if not runs:
        return
    text = answer.text
    first, last = runs[0], runs[-1]
    if answer.has_reasoning:
        # The answer comes last; what stands before it may contain the same text.
        at = last.blob.rfind(text) if text else -1
        thought_at = learned.find(answer.thought, 0, text_at) if answer.thought else -1
        if at < 0:
            return
        before = first.blob.find(answer.thought, 0, at if first is last else None)
        if thought_at >= 0 and before >= 0:
            yield first, before, thought_at, len(answer.thought)
        yield last, at, text_at, len(text)
        return
    begin = 0
    if first.first == 0:
        # Servers of SentencePiece models may write the space before an answer, and leave it out of the text;
        # a student's template may have it, too.
        ways = [(0, text_at), (0, 0), (first.blob.startswith(b" "), text_at)]
        size, skipped, in_learned = max(
            (_common_prefix(first.blob[skipped:], learned[in_learned:]), -int(skipped), in_learned)
            for skipped, in_learned in ways
        )
        in_run = -skipped
        yield first, in_run, in_learned, size
        begin = max(0, size - (text_at - in_learned))
    if last is first or begin == len(text):
        return
    # Bytes between are unknown. The end is found from behind, without a token that ended the answer.
    for blob, cut in ((last.blob, 0), (last.blob[: last.starts[-2]], 1)):
        size = min(_common_prefix(blob[::-1], text[::-1]), len(text) - begin)
        if size and (cut or size == len(blob)):
            yield last, len(blob) - size, text_at + len(text) - size, size
            return


def _common_prefix(one: bytes, other: bytes) -> int:
    """Count the bytes with which both begin."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return int(np.argmax(np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)))

"""Map the probabilities of a teacher's tokens to a student's tokens, at aligned positions. Loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trainer.data.chat_template import Example, SparseTargets
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import NOTHING, TeacherTokens, TokenTable
from trainer.data.token_alignment import Alignment
from trainer.data.token_paths import MOST_LEVELS, Listing, certain_tokens, follow

Numbers = npt.NDArray[np.int32]

# Listed probabilities may sum to this: float16 rounds each of them by up to 0.4 %.
LARGEST_MASS = 1.01
# Below it a probability is 0 in fp64.
SMALLEST_LOG_PROB = -700.0
# Positions that say nothing beyond the answer itself, as they are counted.
CERTAIN = "positions with a probability of 1 and no alternative"


class TokenMapping:
    """Map the probabilities of teacher tokens to student tokens.

    Args:
        mapped: student id by teacher token, with one more element for `NOTHING`.
        ambiguous: texts that may become a longer student token.
        counts: grows by what can't be used.

    Attributes:
        mapped, listed: sums of the probabilities that reached a student token, and of all listed ones.
    """

    def __init__(
        self,
        table: TokenTable,
        student: StudentTokens,
        mapped: Numbers,
        ambiguous: set[bytes],
        counts: Counter[str],
    ) -> None:
        self._table = table
        self._student = student
        self._ids = mapped
        self._ambiguous = ambiguous
        self._counts = counts
        end = student.end_of_turn[0]
        self._is_text = [not table.is_control(n) and table.data[n] is not None for n in range(len(table))]
        self._is_end = [not is_text and mapped[n] == end for n, is_text in enumerate(self._is_text)]
        open_tokens = [is_text and table.data[n] in ambiguous for n, is_text in enumerate(self._is_text)]
        self._is_open = np.array([*open_tokens, False])
        self.mapped = self.listed = 0.0

    def targets(self, example: Example, tokens: TeacherTokens, alignment: Alignment) -> SparseTargets | None:
        """Return the soft targets of an example; None if it has none.

        The order of the alternatives doesn't matter: a token that is listed twice counts once, with its
        higher probability, and student tokens are sorted by probability.
        """
        _count(tokens, alignment.entries, self._counts)
        entry, token, probability = _distinct(tokens.tokens, tokens.log_probs)
        totals = np.bincount(entry, probability, minlength=len(tokens.tokens))
        anchored = totals[alignment.entries]
        reason = "positions whose probabilities sum to more than 1"
        self._counts[reason] += int((anchored > LARGEST_MASS).sum())
        usable = totals <= LARGEST_MASS
        is_alone = np.bincount(entry, minlength=len(totals)) == 1
        self._counts[CERTAIN] += int((is_alone & (totals == 1.0))[alignment.entries].sum())
        # Anchors with a token that may become a longer one; the others are mapped all at once.
        is_open = np.zeros(len(totals), dtype=bool)
        is_open[entry[self._is_open[token]]] = True
        line = np.full(len(totals), NOTHING)
        line[alignment.entries] = np.arange(len(alignment.entries))
        kept = (line[entry] != NOTHING) & usable[entry] & ~is_open[entry]
        row, ids, share = line[entry[kept]], self._ids[token[kept]], probability[kept]
        followed = [at for at, e in enumerate(alignment.entries.tolist()) if is_open[e] and usable[e]]
        if followed:
            starts = np.searchsorted(entry, np.arange(len(totals) + 1))
            listings = _Listings(self, tokens.tokens[:, 0], starts, token, probability, usable)
            more = self._follow(example, alignment, followed, listings)
            row, ids = np.concatenate([row, more[0]]), np.concatenate([ids, more[1]])
            share = np.concatenate([share, more[2]])
        known = ids != NOTHING
        self._counts["alternatives without a student token"] += int((~known).sum())
        places, inverse = np.unique(row[known] * np.int64(1 << 32) + ids[known], return_inverse=True)
        merged = np.zeros(len(places))
        np.add.at(merged, inverse, share[known])
        row, ids = (places >> 32).astype(np.int64), (places & 0xFFFFFFFF).astype(np.int32)
        self.mapped += float(merged.sum())
        self.listed += float(anchored[usable[alignment.entries]].sum())
        return _laid_out(row, ids, merged, alignment.positions) if len(row) else None

    def _follow(
        self, example: Example, alignment: Alignment, lines: Sequence[int], listings: _Listings
    ) -> tuple[npt.NDArray[np.int64], Numbers, npt.NDArray[np.float64]]:
        """Return line, student token and probability of the anchors that are followed along the answer."""
        student = self._student
        supervised = example.ids[example.prompt_length :]
        targets = {at: int(supervised[alignment.positions[at]]) for at in lines}
        paths = {
            at: follow(
                listings.from_entry(int(alignment.entries[at])),
                student.data[targets[at]],
                self._ambiguous.__contains__,
            )
            for at in lines
        }
        student.encode_ahead(text for path in paths.values() for text in (*path.texts, *path.ended) if text)
        row: list[int] = []
        ids: list[int] = []
        share: list[float] = []
        for at, path in paths.items():
            tokens = certain_tokens(path, targets[at], student.first, student.data, student.end_of_turn[0])
            row += [at] * len(tokens)
            ids += tokens.keys()
            share += tokens.values()
        return np.array(row, dtype=np.int64), np.array(ids, dtype=np.int32), np.array(share)

    def listing(self, chosen: int, tokens: Sequence[int], probabilities: Sequence[float]) -> Listing:
        """Return the alternatives at one teacher token by their bytes."""
        data, texts, ends = self._table.data, dict[bytes, float](), 0.0
        for token, probability in zip(tokens, probabilities, strict=True):
            text = data[token]
            if self._is_text[token] and text is not None:
                texts[text] = texts.get(text, 0.0) + probability
            elif self._is_end[token]:
                ends += probability
        return Listing(data[chosen] if self._is_text[chosen] else None, texts, ends, sum(probabilities))


class _Listings:
    """Make the listings of one answer's teacher tokens when they are needed."""

    def __init__(
        self,
        mapping: TokenMapping,
        chosen: Numbers,
        starts: npt.NDArray[np.int64],
        token: Numbers,
        probability: npt.NDArray[np.float64],
        usable: npt.NDArray[np.bool_],
    ) -> None:
        self._mapping = mapping
        self._chosen = chosen
        self._starts = starts
        self._token = token
        self._probability = probability
        self._usable = usable
        self._made: dict[int, Listing | None] = {}

    def from_entry(self, entry: int) -> list[Listing | None]:
        """Return the listings from a teacher token on, as many as may be followed."""
        return [self._at(at) for at in range(entry, min(entry + MOST_LEVELS, len(self._chosen)))]

    def _at(self, at: int) -> Listing | None:
        if at not in self._made:
            part = slice(self._starts[at], self._starts[at + 1])
            self._made[at] = None
            if self._usable[at]:
                self._made[at] = self._mapping.listing(
                    int(self._chosen[at]), self._token[part].tolist(), self._probability[part].tolist()
                )
        return self._made[at]


def _count(tokens: TeacherTokens, entries: Numbers, counts: Counter[str]) -> None:
    """Count what can't be used at the anchors."""
    numbers, log_probs = tokens.tokens[entries], tokens.log_probs[entries]
    is_listed = numbers != NOTHING
    unusable = is_listed & (log_probs < SMALLEST_LOG_PROB)
    counts["log-probabilities that can't be read"] += int(np.isnan(log_probs).sum())
    counts["alternatives without a probability (-inf, -9999)"] += int(unusable.sum())
    counts["positions with fewer alternatives than others"] += int((~is_listed).any(axis=1).sum())
    counts["positions with a probability above 1"] += int(np.isposinf(log_probs).any(axis=1).sum())


def _distinct(
    numbers: Numbers, log_probs: npt.NDArray[np.float16]
) -> tuple[npt.NDArray[np.int64], Numbers, npt.NDArray[np.float64]]:
    """Return row, token and probability of the usable entries of [rows, 1 + k], each token of a row once.

    They are sorted by row, then by probability. A row with a probability above 1 has none.
    """
    has_excess = np.isposinf(log_probs).any(axis=1, keepdims=True)
    is_usable = np.isfinite(log_probs) & (log_probs >= SMALLEST_LOG_PROB) & ~has_excess
    row, column = np.nonzero((numbers != NOTHING) & is_usable)
    token, probability = numbers[row, column], np.exp(log_probs[row, column].astype(np.float64))
    order = np.lexsort((-probability, token, row))
    row, token, probability = row[order], token[order], probability[order]
    is_first = np.ones(len(row), dtype=bool)
    is_first[1:] = (row[1:] != row[:-1]) | (token[1:] != token[:-1])
    row, token, probability = row[is_first], token[is_first], probability[is_first]
    # Sums in order of size: the numbers of tokens depend on which answer was read first, a sum must not.
    order = np.lexsort((probability, row))
    return row[order], token[order], probability[order]


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

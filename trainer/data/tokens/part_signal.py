"""Keep the teacher's log-probabilities of a part's rows, aligned with the student's tokens. Loads no torch.

`signal_rows.bin` has a record (`RECORD`) for each row with log-probabilities, in the order of the rows.
`signal.bin` has the arrays of each, one after the other: the teacher's tokens (int32), the aligned positions
and entries (int32), the log-probabilities (float16). The tokens are numbers in the list of
`signal_tokens.json`, which has their texts and bytes, and the sampling settings of the rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.teacher_tokens import NOTHING, TeacherTokens, TokenTable
from trainer.data.token_alignment import REASONS, Alignment
from trainer.data.tokens.part import SIGNAL, SIGNAL_FILES, SIGNAL_ROWS, SIGNAL_TOKENS

# row: number of the row in its part. start: where the file of arrays has it. entries, width: shape of the
# tokens. anchors: aligned positions. end: the teacher's token that ended the answer, or `NOTHING`.
# sampling: number of its settings. same_spans: see `Alignment`. reasons: counts of what can't be aligned.
RECORD = np.dtype(
    [
        ("start", "<i8"),
        *((name, "<i4") for name in ("row", "entries", "width", "anchors", "end")),
        ("reasons", "<i4", (len(REASONS),)),
        ("sampling", "<u2"),
        ("same_spans", "?"),
    ]
)


class AlignedAnswer(NamedTuple):
    """The teacher's tokens of an answer, and where they begin with the student's."""

    tokens: TeacherTokens
    alignment: Alignment


class SignalWriter:
    """Collect the log-probabilities of a part's rows.

    Args:
        table: numbers the tokens of all rows.
    """

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._records: list[tuple[Any, ...]] = []
        self._arrays = bytearray()
        self._sampling: dict[str, int] = {}

    def add(self, row: int, answer: AlignedAnswer, reasons: Counter[str]) -> None:
        """Add the log-probabilities of a row.

        Args:
            row: its number in the part; rows come in order.
            reasons: counts of what couldn't be aligned.
        """
        tokens, alignment = answer
        entries, width = tokens.tokens.shape
        number = self._sampling.setdefault(tokens.sampling, len(self._sampling))
        self._records.append(
            (
                *(len(self._arrays), row, entries, width, len(alignment.positions), alignment.end),
                tuple(reasons[reason] for reason in REASONS),
                *(number, alignment.same_spans),
            )
        )
        for array in (tokens.tokens, alignment.positions, alignment.entries, tokens.log_probs):
            self._arrays += array.tobytes()

    def files(self) -> dict[str, bytes]:
        """Return the contents of the files, by name."""
        names = [[text, None if data is None else data.hex()] for text, data in self._table.names()]
        described = json.dumps({"tokens": names, "sampling": list(self._sampling)})
        contents = (np.array(self._records, dtype=RECORD).tobytes(), bytes(self._arrays), described.encode())
        return dict(zip(SIGNAL_FILES, contents, strict=True))


class PartSignal:
    """The log-probabilities of one part.

    Attributes:
        records: [rows with log-probabilities] of `RECORD`.
        names: text and bytes of each token, see `TokenTable.names`.
        sampling: settings by number.

    Raises:
        OSError: it can't be read.
    """

    def __init__(self, folder: Path) -> None:
        self.records = np.fromfile(folder / SIGNAL_ROWS, dtype=RECORD)
        self._arrays = (folder / SIGNAL).read_bytes()
        described = json.loads((folder / SIGNAL_TOKENS).read_text())
        self.names = [
            (text, None if data is None else bytes.fromhex(data)) for text, data in described["tokens"]
        ]
        self.sampling: list[str] = described["sampling"]

    def answers(self, records: Any, numbers: np.ndarray[Any, np.dtype[np.int32]]) -> Iterator[AlignedAnswer]:
        """Yield the answers of some records.

        Args:
            numbers: [tokens + 1] int32, the number that each token of this part has elsewhere; the last one
                is `NOTHING`.
        """
        for record in records:
            entries, width, anchors = (int(record[name]) for name in ("entries", "width", "anchors"))
            start = int(record["start"])
            whole = np.frombuffer(self._arrays, np.int32, entries * width + 2 * anchors, start)
            log_probs = np.frombuffer(self._arrays, np.float16, entries * width, start + whole.nbytes)
            listed, positions, at = np.split(whole, [entries * width, entries * width + anchors])
            end = int(record["end"])
            end = end if end == NOTHING else int(numbers[end])
            shape = (entries, width)
            yield AlignedAnswer(
                TeacherTokens(numbers[listed].reshape(shape), log_probs.reshape(shape)),
                Alignment(positions, at, bool(record["same_spans"]), end),
            )

"""Define the record that a part of the token store has for each row of the corpus. Loads no torch.

A record has a fixed size, so the record of a row is found by its number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class RowFlag:
    """What a row is; a record holds these bits in `flags`.

    Attributes:
        LEARNABLE: of the training split, and nothing in the row itself keeps it from being learned.
        HELD_OUT: of another split. TEXT: all of its messages are text.
        RENDERED: it has ids. REFUSED: the chat template refuses it; `text` holds the message.
        TERMINATED: its answer has an end of turn.
        THINKING: its answer begins with <think>. REASONING: it has reasoning in a column of its own.
        ANSWERED: the teacher's answer to it is usable.
    """

    LEARNABLE = 1
    HELD_OUT = 2
    TEXT = 4
    RENDERED = 8
    REFUSED = 16
    TERMINATED = 32
    THINKING = 64
    REASONING = 128
    ANSWERED = 256


# start: the row's first id in the file of ids; length: its ids; prompt_length: those of the prompt.
# id_start, id_bytes, text_start, text_bytes: where the file of texts has the prompt id, and a text: what a
# held-out row asks, or why a row is refused.
# faults: bits of `data_checks.RowChecker`. reason, teacher, control: numbers in the part's lists of reasons
# for leaving a row out, of teachers, and of sets of control tokens.
# verdict: of the verifiers (`AnswerVerdict`, in its order), 255 where none was asked.
# key, completion, origin: the hashes of a leaf of the hash tree. prompt, spelling, question, answer, id: 16
# bytes of a hash of the prompt's content, of the same normalised, of that without the system prompt (none
# where nothing is left), of the normalised answer, and of the prompt id.
RECORD = np.dtype(
    [
        *((name, "<i8") for name in ("start", "id_start", "text_start")),
        *((name, "<i4") for name in ("length", "prompt_length", "sample_index", "id_bytes", "text_bytes")),
        *((name, "<u2") for name in ("flags", "faults", "reason", "teacher", "control")),
        ("verdict", "u1"),
        *((name, "S32") for name in ("key", "completion", "origin")),
        *((name, "S16") for name in ("prompt", "spelling", "question", "answer", "id")),
    ]
)
NO_VERDICT = 255

Records = npt.NDArray[Any]


def has(records: Records, flag: int) -> npt.NDArray[np.bool_]:
    """Return for each record whether it has all bits of `flag`."""
    return np.asarray((records["flags"] & flag) == flag)


def first_64_bits(hashes: npt.NDArray[Any], size: int) -> npt.NDArray[np.uint64]:
    """Return the first 8 bytes of hashes of `size` bytes as numbers."""
    words = np.ascontiguousarray(hashes).view(np.uint64).reshape(len(hashes), size // 8)
    return np.ascontiguousarray(words[:, 0])


def full_bytes(value: bytes, size: int) -> bytes:
    """Return a hash of a record as it was: NumPy drops zeros at the end of a string of bytes."""
    return value.ljust(size, b"\0")

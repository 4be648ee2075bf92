"""Keep the teacher's log-probabilities of many answers in arrays, and number its tokens. Loads no torch.

The store has one object for each token and each alternative. Here a token is a number, and an answer takes
6 bytes for each of its listed probabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# Servers write -9999 for "not computed". A probability below e^-9000 is 0 in any case.
LEAST_LOG_PROB = -9000.0
# Log-probabilities up to here count as 0: they are the rounding of a probability of 1.
LARGEST_LOG_PROB = 1e-3
# Entries of the generated token and its alternatives that are kept: APIs list up to 20.
MOST_LISTED = 64
# Control tokens by their customary spelling. Text of the answer is never matched with it: see `is_control`.
_CONTROL = re.compile(
    r"<\|[^<>\s]*\|>|<｜[^<>\s]*｜>|</?s>|<(?:eos|bos|pad|unk|eot|end_of_turn|start_of_turn|end_of_text)>"
    r"|\[/?INST\]|\[(?:PAD|CLS|SEP|UNK|EOS|BOS)\]"
)
# How the older completions spell a token that is a part of a character.
_BYTES_AS_TEXT = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"
# A place in the arrays that holds no token.
NOTHING = -1


class TokenTable:
    """Number the distinct tokens of a teacher.

    A token is identified by its bytes; where a server gives none, by its text.

    Attributes:
        data: the bytes of each token; None where neither bytes nor text show them.
        texts: what the server wrote for each token.
    """

    def __init__(self) -> None:
        self.data: list[bytes | None] = []
        self.texts: list[str] = []
        self._numbers: dict[bytes | str, int] = {}

    def __len__(self) -> int:
        return len(self.data)

    def number(self, text: str, data: bytes | None) -> int:
        """Return the number of a token, a new one if it wasn't seen before."""
        key: bytes | str = text if data is None else data
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.data)
            self.data.append(_exact_bytes(text, data))
            self.texts.append(text)
        return number

    def is_control(self, number: int) -> bool:
        """Whether a token looks like a control token: it has no text, or the spelling of one."""
        data = self.data[number]
        return data == b"" or _CONTROL.fullmatch(self.texts[number]) is not None


@dataclass(frozen=True, slots=True)
class TeacherTokens:
    """Hold the generated tokens of one answer, and the alternatives to each of them.

    Attributes:
        tokens: [n, 1 + k] int32 numbers in a `TokenTable`: first the generated token, then the listed ones;
            `NOTHING` where fewer are listed.
        log_probs: [n, 1 + k] float16, natural logarithm. -inf: probability 0 or not computed; NaN: can't be
            read; +inf: above a probability of 1, which no teacher means.
        sampling: temperature and top_p of the request, which some servers apply to log-probabilities.
    """

    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float16]
    sampling: str = ""


@dataclass(frozen=True, slots=True)
class TeacherSignal:
    """Hold the log-probabilities of a corpus: the table of tokens, and the answers by key."""

    table: TokenTable = field(default_factory=TokenTable)
    answers: dict[str, TeacherTokens] = field(default_factory=dict)

    def add(self, key: str, logprobs: Sequence[Mapping[str, Any]] | None, request_json: str) -> None:
        """Keep the log-probabilities of an answer, as the column `logprobs` of the store has them."""
        if logprobs and key not in self.answers:
            tokens, log_probs = read_tokens(logprobs, self.table)
            self.answers[key] = TeacherTokens(tokens, log_probs, _sampling(request_json))

    def of(self, keys: Sequence[str]) -> TeacherSignal:
        """Return the log-probabilities of some of the answers."""
        return TeacherSignal(self.table, {key: self.answers[key] for key in keys if key in self.answers})


def read_tokens(
    logprobs: Sequence[Mapping[str, Any]], table: TokenTable
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]:
    """Convert a value of the column `logprobs` to arrays; see `TeacherTokens`.

    Numbers are rounded to float16, as in a sealed shard: a row that isn't sealed yet must give the same
    targets before and after.
    """
    listed = [(entry.get("top") or ())[:MOST_LISTED] for entry in logprobs]
    width = 1 + max(map(len, listed), default=0)
    tokens = np.full((len(logprobs), width), NOTHING, dtype=np.int32)
    values = np.full((len(logprobs), width), -np.inf, dtype=np.float64)
    for row, (entry, top) in enumerate(zip(logprobs, listed, strict=True)):
        for column, item in enumerate((entry, *top)):
            tokens[row, column] = table.number(item.get("token") or "", item.get("bytes"))
            value = item.get("logprob")
            values[row, column] = np.nan if value is None else value
    with np.errstate(over="ignore"):  # what is too large for float16 becomes infinite, as it should
        log_probs = values.astype(np.float16)
    log_probs[log_probs > LARGEST_LOG_PROB] = np.inf
    log_probs[(log_probs > 0) & (log_probs <= LARGEST_LOG_PROB)] = 0
    log_probs[log_probs <= LEAST_LOG_PROB] = -np.inf
    return tokens, log_probs


def _exact_bytes(text: str, data: bytes | None) -> bytes | None:
    """Return the bytes of a token; None where a part of a character was replaced by a sign for it."""
    if data is not None:
        return None if _UNREADABLE.encode() in data else data
    if match := _BYTES_AS_TEXT.fullmatch(text):
        return bytes.fromhex(match[1].replace("\\x", ""))
    return None if _UNREADABLE in text else text.encode("utf-8", "surrogatepass")


def _sampling(request_json: str) -> str:
    try:
        request = json.loads(request_json)
    except ValueError:
        return ""
    if not isinstance(request, dict):
        return ""
    names = ("temperature", "top_p", "top_k", "min_p")
    return ", ".join(f"{name} {request[name]}" for name in names if request.get(name) is not None)

"""Keep the teacher's log-probabilities of many answers in arrays, and number its tokens. Loads no torch.

The store has one object for each token and each alternative. Here a token is a number, and an answer takes
6 bytes for each of its listed probabilities.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

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

    def find(self, text: str, data: bytes | None) -> int:
        """Return the number of a token; `NOTHING` if it wasn't seen."""
        return self._numbers.get(text if data is None else data, NOTHING)

    def names(self) -> Iterator[tuple[str, bytes | None]]:
        """Yield text and bytes of each token as `number` takes them, in the order of the numbers."""
        for key, text in zip(self._numbers, self.texts, strict=True):
            yield text, key if isinstance(key, bytes) else None

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
    """Hold the log-probabilities of answers: the table of tokens, and the arrays by key."""

    table: TokenTable = field(default_factory=TokenTable)
    answers: MutableMapping[str, TeacherTokens] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch, keys: Collection[str] | None = None) -> None:
        """Read the log-probabilities of the answers of a batch; the first of a key counts.

        Args:
            batch: columns `key`, `logprobs` and `request_json` of the store.
            keys: of the answers wanted; None: all.
        """
        names = batch.column("key").to_pylist()
        wanted = [
            at for at, key in enumerate(names) if (keys is None or key in keys) and key not in self.answers
        ]
        part = batch.take(pa.array(wanted, pa.int64()))
        requests = part.column("request_json").to_pylist()
        arrays = read_column(part.column("logprobs"), self.table)
        for at, (tokens, log_probs), request in zip(wanted, arrays, requests, strict=True):
            if len(tokens):
                self.answers[names[at]] = TeacherTokens(tokens, log_probs, _sampling(request))


def read_signal(batches: Iterable[pa.RecordBatch], keys: Collection[str] | None = None) -> TeacherSignal:
    """Read the log-probabilities of some answers; see `TeacherSignal.add`."""
    signal = TeacherSignal()
    for batch in batches:
        signal.add(batch, keys)
    return signal


def read_column(
    column: pa.ListArray, table: TokenTable
) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float16]]]:
    """Convert values of the column `logprobs` to arrays; see `TeacherTokens`. A null gives empty arrays."""
    offsets = np.asarray(column.offsets)
    token, data, log_prob, top = column.values[offsets[0] : offsets[-1]].flatten()
    listed = np.asarray(top.offsets) if len(top) else np.zeros(1, dtype=np.int32)
    other = top.values[listed[0] : listed[-1]].flatten()
    numbers, others = _numbers(token, data, table), _numbers(other[0], other[1], table)
    values, other_values = _usable(log_prob), _usable(other[2])
    begins, offsets = listed[:-1] - listed[0], offsets - offsets[0]
    sizes = np.minimum(np.diff(listed), MOST_LISTED)
    result = []
    for begin, end in pairwise(offsets.tolist()):
        count = sizes[begin:end]
        width = 1 + int(count.max(initial=0))
        tokens = np.full((end - begin, width), NOTHING, dtype=np.int32)
        log_probs = np.full((end - begin, width), -np.inf, dtype=np.float16)
        tokens[:, 0], log_probs[:, 0] = numbers[begin:end], values[begin:end]
        row = np.repeat(np.arange(end - begin), count)
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        source = np.repeat(begins[begin:end], count) + place
        tokens[row, place + 1], log_probs[row, place + 1] = others[source], other_values[source]
        result.append((tokens, log_probs))
    return result


def _numbers(texts: pa.StringArray, data: pa.BinaryArray, table: TokenTable) -> npt.NDArray[np.int32]:
    """Return the number of each token; the table is asked once for each distinct one."""
    texts = pc.fill_null(texts, "")
    by_bytes = pc.binary_join_element_wise(pa.scalar(b"b"), data, b"")
    by_text = pc.binary_join_element_wise(pa.scalar(b"t"), texts.cast(pa.binary()), b"")
    encoded = pc.coalesce(by_bytes, by_text).dictionary_encode()
    indices = np.asarray(encoded.indices)
    _, first = np.unique(indices, return_index=True)
    places = pa.array(first)
    distinct = zip(texts.take(places).to_pylist(), data.take(places).to_pylist(), strict=True)
    of_table = np.array([table.number(text, exact) for text, exact in distinct], dtype=np.int32)
    numbers: npt.NDArray[np.int32] = of_table[indices]
    return numbers


def _usable(column: pa.Array) -> npt.NDArray[np.float16]:
    """Return log-probabilities with the three values of `TeacherTokens` that stand for no probability."""
    values = np.frombuffer(column.buffers()[1] or b"", np.float16, len(column), column.offset * 2).copy()
    values[np.asarray(column.is_null())] = np.nan
    values[values > LARGEST_LOG_PROB] = np.inf
    values[(values > 0) & (values <= LARGEST_LOG_PROB)] = 0
    values[values <= LEAST_LOG_PROB] = -np.inf
    return values


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

"""Look up the tokens of a student by their bytes. Loads no torch.

The bytes come from the names in the vocabulary (`harvester.system.token_bytes`); whoever uses them compares
their sum with the text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from harvester.system.token_bytes import is_byte_fallback, token_bytes
from trainer.data.chat_template import Renderer
from trainer.data.teacher_tokens import NOTHING, TokenTable

Numbers = npt.NDArray[np.int32]


def ids_by_bytes(
    data: Sequence[bytes], special: Collection[int], fallbacks: Collection[int]
) -> dict[bytes, int | None]:
    """Return the id of each token's bytes, None where several have the same.

    Args:
        special: tokens that are left out.
        fallbacks: tokens for single bytes, used only where no other token has the byte.
    """
    ids: dict[bytes, int | None] = {data[number]: number for number in fallbacks}
    seen: set[bytes] = set()
    for number, value in enumerate(data):
        if value and number not in special and number not in fallbacks:
            ids[value] = None if value in seen else number
            seen.add(value)
    return ids


class StudentTokens:
    """Look up a student's tokens by bytes.

    Attributes:
        data: bytes of each id.
        special: ids of control tokens, which no text is made of.
        end_of_turn: ids that end an answer.
    """

    def __init__(self, renderer: Renderer) -> None:
        tokenizer = renderer.tokenizer
        self._renderer = renderer
        self.data = token_bytes(tokenizer)
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset(added | set(tokenizer.all_special_ids))
        names = tokenizer.convert_ids_to_tokens(range(len(self.data)))
        fallbacks = {i for i, name in enumerate(names) if name and is_byte_fallback(name)}
        self._ids = ids_by_bytes(self.data, self.special, fallbacks)
        self._first: dict[bytes, int | None] = {}
        self.end_of_turn = renderer.chat_shape.end_of_turn

    def first(self, text: bytes) -> int | None:
        """Return the token with these bytes, else the first one of the text encoded alone, if any."""
        if text not in self._first:
            self.encode_ahead([text])
        return self._first[text]

    def encode_ahead(self, texts: Iterable[bytes]) -> None:
        """Look up many texts for `first` at once, which is much faster."""
        to_encode: dict[bytes, str] = {}
        for text in texts:
            if text in self._first or text in to_encode:
                continue
            self._first[text] = self._ids.get(text)
            if self._first[text] is None:
                try:
                    to_encode[text] = text.decode()
                except UnicodeDecodeError:
                    continue
        encoded = self._renderer.texts(list(to_encode.values())) if to_encode else []
        for text, ids in zip(to_encode, encoded, strict=True):
            if ids and text.startswith(self.data[ids[0]]):
                self._first[text] = ids[0]

    def map_by_id(self, table: TokenTable) -> Numbers | None:
        """Return the student's id of each teacher token; None if one has not exactly one by its bytes."""
        mapped = np.full(len(table) + 1, NOTHING, dtype=np.int32)
        for number, data in enumerate(table.data):
            if table.is_control(number) or data is None:
                continue
            match = self._ids.get(data)
            if match is None:
                return None
            mapped[number] = match
        return mapped

    def map_by_bytes(self, table: TokenTable) -> Numbers:
        """Return the first student token of each teacher token's bytes; `NOTHING` where it isn't known."""
        mapped = np.full(len(table) + 1, NOTHING, dtype=np.int32)
        texts = {
            number: data
            for number, data in enumerate(table.data)
            if data is not None and not table.is_control(number)
        }
        self.encode_ahead(texts.values())
        for number, data in texts.items():
            match = self.first(data)
            mapped[number] = NOTHING if match is None else match
        return mapped

    def map_ends(self, mapped: Numbers, table: TokenTable, ends: Collection[int]) -> None:
        """Map the teacher's ends of a turn to the student's: tokens that ended an answer, or are named alike.

        Args:
            mapped: changed in place.
            ends: teacher tokens that ended an answer.
        """
        name = self.data[self.end_of_turn[0]]
        for number in range(len(table)):
            is_namesake = table.is_control(number) and table.data[number] == name
            if number in ends or is_namesake:
                mapped[number] = self.end_of_turn[0]


def ambiguous_bytes(table: TokenTable, used: Sequence[bytes]) -> set[bytes]:
    """Return the bytes that begin a longer student token which the teacher can't mean by a token of its own.

    Args:
        used: bytes of the student's tokens that occur in the answers, without control tokens: "<" in a text
            does not begin one.
    """
    of_teacher = {data for data in table.data if data}
    return {token[:size] for token in used if token not in of_teacher for size in range(1, len(token))}

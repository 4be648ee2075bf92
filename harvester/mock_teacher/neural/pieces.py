"""Give the bytes of each token of a vocabulary, and the text of the tokens of an answer."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """Return the byte for each character of byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + at): value for at, value in enumerate(others)}


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id, for byte-level BPE and for SentencePiece with byte fallback."""
    table = byte_of_character()
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()
    result = []
    for number in range(len(tokenizer)):
        name = added.get(number) or tokenizer.convert_ids_to_tokens(number) or ""
        if number in added:
            result.append(name.encode())
        elif is_byte_level:
            result.append(bytes(table[letter] for letter in name if letter in table))
        elif match := _BYTE.fullmatch(name):
            result.append(bytes([int(match[1], 16)]))
        else:
            result.append(name.replace("\u2581", " ").encode())
    return result


def text_pieces(raw: Sequence[bytes]) -> list[str]:
    """Return the text of each token, `raw` being their bytes; the pieces join to the decoded whole.

    A character whose bytes are split over tokens is in the last of them. Bytes that are no UTF-8 become
    U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(data, final=at == len(raw)) for at, data in enumerate(raw, start=1)]


class StopSearch:
    """Find where the first stop sequence begins in bytes that come in pieces; each byte is searched once.

    Attributes:
        pieces: how many were added.
        at: byte at which a stop sequence begins, the earliest of those that the last piece completed; None
            before there is one.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._words = [word.encode() for word in stop]
        self._overlap = max(map(len, self._words), default=1) - 1
        self._tail = b""
        self._size = 0
        self.pieces = 0
        self.at: int | None = None

    def add(self, data: bytes) -> None:
        """Add the bytes of the next token."""
        self.pieces += 1
        searched = self._tail + data
        start = self._size - len(self._tail)
        self._size += len(data)
        places = [start + place for word in self._words if (place := searched.find(word)) >= 0]
        if self.at is None:
            self.at = min(places, default=None)
        self._tail = searched[max(0, len(searched) - self._overlap) :]

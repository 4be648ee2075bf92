"""Give the text of the tokens of an answer, and find stop sequences in their bytes."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


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

"""Compare messages that come in a stream beside its deltas with what the deltas say. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from harvester.api.shapes.parts import read_content


class Snapshots:
    """The messages of one choice, each with the number of pieces that every field had when it came.

    Attributes:
        messages: in the order in which they came.
    """

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self._counts: list[dict[str, int]] = []

    def add(self, message: Any, pieces: Mapping[str, Sequence[Any]]) -> None:
        """Add a message; `pieces` are those of the deltas so far, by field, its own delta's included."""
        self.messages.append(message)
        self._counts.append({name: len(values) for name, values in pieces.items()})

    def repeat(self, pieces: Mapping[str, Sequence[Any]], fields: Collection[str]) -> bool:
        """Whether each message repeats what the deltas say: all of it, all so far, or its own delta.

        A piece that the deltas lack is lost otherwise, even where its letters stand elsewhere in the text.

        Args:
            pieces: those of all deltas, by field.
            fields: which fields of a message hold text.
        """
        if not self.messages:
            return True
        said = {name: _SaidByDeltas(values) for name, values in pieces.items()}
        nothing = _SaidByDeltas(())
        for message, counts in zip(self.messages, self._counts, strict=True):
            if not isinstance(message, Mapping):
                if message:
                    return False
                continue
            for name in fields & message.keys():
                if not said.get(name, nothing).is_repeated_by(message[name], counts.get(name, 0)):
                    return False
        return True


class _SaidByDeltas:
    """Text and reasoning of one field: of each piece, of all, and how long both are after each piece."""

    def __init__(self, pieces: Sequence[Any]) -> None:
        self._pieces = [_texts_in(piece) for piece in pieces]
        texts = [text for text, _ in self._pieces]
        thoughts = [thought for _, thought in self._pieces]
        self._text, self._reasoning = "".join(texts), "".join(thoughts)
        self._text_ends = list(accumulate(map(len, texts), initial=0))
        self._reasoning_ends = list(accumulate(map(len, thoughts), initial=0))

    def is_repeated_by(self, value: Any, count: int) -> bool:
        """Whether a message's field that came after `count` pieces says nothing new."""
        given = _texts_in(value)
        if given in (("", ""), (self._text, self._reasoning)):
            return True
        if count and given == self._pieces[count - 1]:
            return True
        so_far = self._text[: self._text_ends[count]], self._reasoning[: self._reasoning_ends[count]]
        return given == so_far


def _texts_in(value: Any) -> tuple[str, str]:
    """Return the text and the reasoning of a member of a message."""
    content = read_content(value)
    return "".join(content.text), "".join(content.reasoning)

"""Keep held-out prompts with all of the teacher's answers in a temporary file. Loads no torch.

The token store keeps the first answer to each of them. There may be a hundred thousand prompts, and some
kilobytes of each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.quality.verifiers.verifiers import Candidate
from trainer.data.conversation import Conversation
from trainer.data.held_out import HeldOut
from trainer.data.tokens.row_texts import RowTexts


class HeldOutTexts(Sequence[HeldOut]):
    """Held-out prompts, read when they are asked for: some tens of bytes of each row are held.

    Args:
        folder: in which the file lies, under no name.
        places: of the rows, in the order of the prompts; the rows of a prompt in the order of its answers.
        bounds: [prompts + 1] where the rows of each prompt begin in `places`.
    """

    def __init__(
        self, folder: Path, places: npt.NDArray[np.integer[Any]], bounds: npt.NDArray[np.integer[Any]]
    ) -> None:
        self._texts = RowTexts(folder, len(places))
        self._places = places.astype(np.int32)
        self._bounds = bounds.astype(np.int32)

    def add(self, place: int, held: HeldOut) -> None:
        """Add a row as a prompt with one answer.

        Raises:
            StoreFull, StoreError: the disk is full or refuses.
        """
        self._texts.add(place, _text_of(held))

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self._bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        """Return one prompt, or the prompts of a slice."""
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        number = range(len(self))[number]
        rows = self._places[self._bounds[number] : self._bounds[number + 1]]
        first, *others = (_held_out_of(self._texts.read(int(place))) for place in rows)
        return replace(first, candidates=tuple(_candidates(first, others))) if others else first


def _candidates(first: HeldOut, others: Sequence[HeldOut]) -> Iterator[Candidate]:
    for held in (first, *others):
        yield from held.candidates


def _text_of(held: HeldOut) -> bytes:
    values = {
        **{name: getattr(held, name) for name in HeldOut.__slots__},
        "conversation": {"messages": held.conversation.messages, "tools": held.conversation.tools},
        "candidates": [
            {name: getattr(candidate, name) for name in Candidate.__dataclass_fields__}
            for candidate in held.candidates
        ],
    }
    return json.dumps(values).encode()  # in ASCII, so that half a surrogate pair is kept


def _held_out_of(text: bytes) -> HeldOut:
    values = json.loads(text)
    asked = values["conversation"]
    values["conversation"] = Conversation(tuple(asked["messages"]), tuple(asked["tools"]))
    values["candidates"] = tuple(map(_candidate_of, values["candidates"]))
    # Few values, of many prompts: who keeps them keeps them once.
    values["task"], values["split"] = sys.intern(values["task"]), sys.intern(values["split"])
    return HeldOut(**values)


def _candidate_of(values: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**values, "tags": tuple(map(sys.intern, values["tags"]))})

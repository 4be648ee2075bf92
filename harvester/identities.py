"""Ids of prompts tell rows apart: two prompts with one id are a mistake, and both places are named.

Only 16 bytes a prompt are held while all of them pass; a second walk looks for the clash, if there is one.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from harvester.errors import PromptError
from harvester.journey import Prompt


class Identities:
    """64-bit digests of the ids that passed, and of ids with what they asked."""

    def __init__(self) -> None:
        self._ids = array("Q")
        self._asked = array("Q")

    def note(self, prompt: Prompt) -> None:
        """One more passes."""
        identity = prompt.id.encode("utf-8", "surrogatepass")
        self._ids.append(_digest(identity))
        self._asked.append(_digest(identity + b"\0" + _messages(prompt)))

    def clash(self) -> bool:
        """Whether some id stands for two prompts. The same prompt given twice is none."""
        return _distinct(self._ids) != _distinct(self._asked)


def named(prompts: Iterable[Prompt]) -> PromptError:
    """The error that names the first clash of these prompts."""
    seen: dict[str, tuple[bytes, str]] = {}
    for prompt in prompts:
        place = f"{prompt.file}:{prompt.line}"
        asked, before = seen.setdefault(prompt.id, (_messages(prompt), place))
        if asked != _messages(prompt):
            return PromptError(
                f"the id {prompt.id!r} belongs to another prompt, at {before}",
                place=place,
                remedy="an id tells rows apart: change one, or leave both out",
            )
    return PromptError("two prompts have one id", remedy="an id tells rows apart")


def _messages(prompt: Prompt) -> bytes:
    return orjson.dumps(prompt.messages, option=orjson.OPT_SORT_KEYS)


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _distinct(digests: array[int]) -> int:
    column = pa.Array.from_buffers(pa.uint64(), len(digests), [None, pa.py_buffer(digests)])
    part_of = pc.shift_right(column, pa.scalar(60, pa.uint64()))
    # A sixteenth at a time: the hash table of a count takes many times the room of what it counts.
    parts = (pc.filter(column, pc.equal(part_of, part)) for part in range(16))
    return sum(pc.count_distinct(part).as_py() for part in parts)

"""Ids of prompts tell rows apart: two prompts with one id are a mistake, and both places are named.

Only 8 bytes a prompt are held while all of them pass. A second walk, over rows whose ids came twice, tells
the same prompt given twice, which is none, from a clash.
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
    """64-bit digests of the ids that passed."""

    def __init__(self) -> None:
        self._ids = array("Q")

    def note(self, prompt: Prompt) -> None:
        """One more passes."""
        self._ids.append(_digest(prompt.id))

    def repeated(self) -> frozenset[int]:
        """Digests that came more than once."""
        column = pa.Array.from_buffers(pa.uint64(), len(self._ids), [None, pa.py_buffer(self._ids)])
        part_of = pc.shift_right(column, pa.scalar(60, pa.uint64()))
        found: list[int] = []
        for part in range(16):  # at a time: the hash table of a count takes many times the room of its input
            counts = pc.value_counts(pc.filter(column, pc.equal(part_of, part)))
            found += counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()
        return frozenset(found)


def clash(prompts: Iterable[Prompt], repeated: frozenset[int]) -> PromptError | None:
    """The error that names the first two prompts with one id, of those whose ids came more than once."""
    seen: dict[str, tuple[bytes, str]] = {}
    for prompt in prompts if repeated else ():
        if _digest(prompt.id) not in repeated:
            continue
        place = f"{prompt.file}:{prompt.line}"
        asked = hashlib.blake2b(orjson.dumps(prompt.messages, option=orjson.OPT_SORT_KEYS)).digest()
        first, before = seen.setdefault(prompt.id, (asked, place))
        if asked != first:
            return PromptError(
                f"the id {prompt.id!r} belongs to another prompt, at {before}",
                place=place,
                remedy="an id tells rows apart: change one, or leave both out",
            )
    return None


def _digest(identity: str) -> int:
    data = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

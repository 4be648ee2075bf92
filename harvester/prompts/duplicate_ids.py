"""Ids of prompts tell rows apart: two prompts with one id are a mistake, and both places are named.

Only 8 bytes a prompt are held while all of them pass. A second walk, for ids that came twice, holds 16 bytes
a row and tells the same prompt given twice, which is none, from a clash. Only a clash costs a third, which
finds the places.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from harvester.api.request_key import short_digest
from harvester.api.types import Prompt
from harvester.errors import PromptError


class DuplicateIds:
    """64-bit digests of the ids that passed."""

    def __init__(self) -> None:
        self._ids = array("Q")

    def note(self, prompt: Prompt) -> None:
        """One more passes."""
        self._ids.append(_digest(prompt.id))

    def repeated(self) -> array[int]:
        """Digests that came more than once, in ascending order, each once."""
        column = _column(self._ids)
        ids = column.take(pc.array_sort_indices(column))  # a hash table would take ten times the room
        several = ids.slice(1).filter(_neighbours(ids, pc.equal))
        once = several.slice(1).filter(_neighbours(several, pc.not_equal))
        return _numbers(pa.concat_arrays([several.slice(0, 1), once]))


def clash(walk: Callable[[], Iterable[Prompt]], repeated: array[int]) -> PromptError | None:
    """The error that names two prompts with one id, if there are any.

    Args:
        walk: goes over all prompts once more.
        repeated: of the ids that came more than once, see `Identities`.
    """
    told = _told_apart(walk(), repeated) if repeated else None
    if told is None:
        return None
    first: dict[str, tuple[int, str]] = {}
    for prompt in walk():
        if _digest(prompt.id) != told:
            continue
        place = f"{prompt.file}:{prompt.line}"
        asked, before = first.setdefault(prompt.id, (_asked(prompt), place))
        if _asked(prompt) != asked:
            return PromptError(
                f"the id {prompt.id!r} belongs to another prompt, at {before}",
                place=place,
                remedy="an id tells rows apart: change one, or leave both out",
            )
    return None


def _told_apart(prompts: Iterable[Prompt], repeated: array[int]) -> int | None:
    """Digest of an id that two different prompts have, the one whose rows stand first; None for none."""
    ids, asked = array("Q"), array("Q")
    for prompt in prompts:
        digest = _digest(prompt.id)
        place = bisect_left(repeated, digest)
        if place < len(repeated) and repeated[place] == digest:
            ids.append(digest)
            asked.append(_asked(prompt))
    rows = pa.table({"id": _column(ids), "asked": _column(asked)})
    order = pc.sort_indices(rows, sort_keys=[("id", "ascending"), ("asked", "ascending")])
    same = _neighbours(_column(ids).take(order), pc.equal)
    differ = _neighbours(_column(asked).take(order), pc.not_equal)
    clashing = order.slice(1).filter(pc.and_(same, differ))
    return ids[pc.min(clashing).as_py()] if len(clashing) else None


def _neighbours(column: pa.Array, compare: Callable[..., pa.Array]) -> pa.Array:
    """What each value but the first is to the one before it."""
    return compare(column.slice(1), column.slice(0, max(0, len(column) - 1)))


def _column(numbers: array[int]) -> pa.Array:
    return pa.Array.from_buffers(pa.uint64(), len(numbers), [None, pa.py_buffer(numbers)])


def _numbers(column: pa.Array) -> array[int]:
    """The values of an array that begins with its buffer."""
    found = array("Q")
    found.frombytes(memoryview(column.buffers()[1])[: len(column) * found.itemsize])
    return found


def _asked(prompt: Prompt) -> int:
    return short_digest(orjson.dumps(prompt.messages, option=orjson.OPT_SORT_KEYS))


def _digest(identity: str) -> int:
    return short_digest(identity.encode("utf-8", "surrogatepass"))

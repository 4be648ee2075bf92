"""Find two different prompts with the same id, and name both places.

The first pass over the prompts holds 8 bytes a prompt. Many are sorted by Arrow, which is imported for
them only: loading it takes longer than to sort a few. If ids repeat, a second pass holds 16 bytes a
repeated row, to tell the same prompt given twice (no error) from a clash. Only a clash needs a third pass,
which finds the places.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import orjson

from harvester.api.request_key import short_digest
from harvester.api.types import Prompt
from harvester.config.shard import Shard
from harvester.errors import PromptError
from harvester.system.counted import counted

if TYPE_CHECKING:
    import pyarrow as pa

# Up to this number, ids are sorted as Python's integers: it takes 40 bytes an id, and less time than to load
# Arrow.
FEW_IDS = 50_000


class DuplicateIds:
    """Collects 64-bit digests of prompt ids.

    Args:
        part: collect only this part of the ids, by hash, as the other ranks of a fleet collect theirs.
    """

    def __init__(self, part: Shard | None = None) -> None:
        self._ids = array("Q")
        self._part = part or Shard(1, 1)

    def note(self, prompt: Prompt) -> None:
        """Add the id of a prompt."""
        digest = _digest(prompt.id)
        if digest % self._part.of == self._part.rank:
            self._ids.append(digest)

    def repeated(self) -> array[int]:
        """Return digests that occurred more than once, ascending, each once."""
        if len(self._ids) <= FEW_IDS:
            ordered = sorted(self._ids)
            return array("Q", dict.fromkeys(a for a, b in pairwise(ordered) if a == b))
        import pyarrow as pa
        import pyarrow.compute as pc

        column = _column(self._ids)
        ids = column.take(pc.array_sort_indices(column))  # a hash table would take ten times the memory
        several = ids.slice(1).filter(_neighbours(ids, pc.equal))
        once = several.slice(1).filter(_neighbours(several, pc.not_equal))
        return _numbers(pa.concat_arrays([several.slice(0, 1), once]))

    def require_unique(self, walk: Callable[[], Iterable[Prompt]]) -> None:
        """Refuse two different prompts with one id.

        Args:
            walk: reads all prompts once more; called only if ids repeat.

        Raises:
            PromptError: names both places.
        """
        repeated = self.repeated()
        if repeated and (error := clash(walk, repeated)) is not None:
            raise error


def clash(walk: Callable[[], Iterable[Prompt]], repeated: array[int]) -> PromptError | None:
    """Return the error that names two different prompts with the same id, or None.

    Args:
        walk: reads all prompts once more.
        repeated: digests from `DuplicateIds.repeated`.
    """
    clashing, ids = _clashing_ids(walk(), repeated) if repeated else (None, 0)
    if clashing is None:
        return None
    first: dict[str, tuple[int, str]] = {}
    for prompt in walk():
        if _digest(prompt.id) != clashing:
            continue
        place = f"{prompt.file}:{prompt.line}"
        content, before = first.setdefault(prompt.id, (_content_digest(prompt), place))
        if _content_digest(prompt) != content:
            return PromptError(
                f"the id {prompt.id!r} belongs to another prompt, at {before}"
                + (f", and so it is with {counted(ids - 1, 'more id')}" if ids > 1 else ""),
                place=place,
                remedy="an id must be unique: change one, or leave the field out (of all rows, if need be): "
                "a row without an id gets one of its own",
            )
    return None


def _clashing_ids(prompts: Iterable[Prompt], repeated: array[int]) -> tuple[int | None, int]:
    """Return the digest of the first id that different prompts have, and the number of such ids."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids, contents = array("Q"), array("Q")
    for prompt in prompts:
        digest = _digest(prompt.id)
        place = bisect_left(repeated, digest)
        if place < len(repeated) and repeated[place] == digest:
            ids.append(digest)
            contents.append(_content_digest(prompt))
    rows = pa.table({"id": _column(ids), "content": _column(contents)})
    order = pc.sort_indices(rows, sort_keys=[("id", "ascending"), ("content", "ascending")])
    same = _neighbours(_column(ids).take(order), pc.equal)
    differ = _neighbours(_column(contents).take(order), pc.not_equal)
    clashing = order.slice(1).filter(pc.and_(same, differ))
    if not len(clashing):
        return None, 0
    return ids[pc.min(clashing).as_py()], pc.count_distinct(_column(ids).take(clashing)).as_py()


def _neighbours(column: pa.Array, compare: Callable[..., pa.Array]) -> pa.Array:
    """Compare each value but the first with the one before it."""
    return compare(column.slice(1), column.slice(0, max(0, len(column) - 1)))


def _column(numbers: array[int]) -> pa.Array:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.uint64(), len(numbers), [None, pa.py_buffer(numbers)])


def _numbers(column: pa.Array) -> array[int]:
    """Return the values of an Arrow array whose offset is 0."""
    numbers = array("Q")
    numbers.frombytes(memoryview(column.buffers()[1])[: len(column) * numbers.itemsize])
    return numbers


def _content_digest(prompt: Prompt) -> int:
    return short_digest(orjson.dumps([prompt.messages, prompt.fields], option=orjson.OPT_SORT_KEYS))


def _digest(identity: str) -> int:
    return short_digest(identity.encode("utf-8", "surrogatepass"))

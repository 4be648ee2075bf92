"""Sort the rows of the token store by prompt id, sample number and key. Loads no torch.

Prompt ids are texts, and sorting them takes some sixty bytes a row. So the rows are divided by their ids into
ranges, which are sorted one after the other; the records are read once for each range.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.ties import places_of_ties
from trainer.data.tokens.part_reader import PartReader, RowNumbers
from trainer.data.tokens.row_record import Records, first_64_bits

# Rows of a range, about, but there are at most `MOST_RANGES`.
RANGE_ROWS, MOST_RANGES = 1 << 17, 8
# Ids for each range among which its bounds are chosen.
_SAMPLED = 512

_SORT_KEYS = [("id", "ascending"), ("sample", "ascending")]


def sorted_rows(reader: PartReader) -> RowNumbers:
    """Return all rows in order of prompt id, sample number and key."""
    order = np.empty(len(reader), dtype=np.uint32)
    done = 0
    for low, high in pairwise([None, *_bounds(reader), None]):
        rows = _sorted_range(reader, low, high)
        order[done : done + len(rows)] = rows
        done += len(rows)
    assert done == len(order), "each row is in one range"
    pa.default_memory_pool().release_unused()
    return order


def _bounds(reader: PartReader) -> list[bytes]:
    """Return the prompt ids at which a range ends and the next one begins, rising."""
    ranges = min(MOST_RANGES, -(-len(reader) // RANGE_ROWS))
    if ranges <= 1:
        return []
    step = max(1, len(reader) // (_SAMPLED * ranges))
    sampled: list[bytes] = []
    for _, ids in _parts(reader):
        sampled += ids.take(pa.array(range(0, len(ids), step), pa.int64())).to_pylist()
    sampled.sort()
    return sorted({sampled[number * len(sampled) // ranges] for number in range(1, ranges)})


def _parts(reader: PartReader) -> Iterator[tuple[Records, pa.BinaryArray]]:
    """Yield the records of each part and the prompt ids of its rows."""
    for records, prompt_ids in reader.prompt_ids():
        offsets = np.zeros(len(records) + 1, dtype=np.int32)
        np.cumsum(records["id_bytes"], out=offsets[1:])
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(prompt_ids)]
        yield records, pa.Array.from_buffers(pa.binary(), len(records), buffers)


def _sorted_range(reader: PartReader, low: bytes | None, high: bytes | None) -> RowNumbers:
    """Return the rows whose prompt ids lie in a range, sorted.

    Args:
        low: the least id of the range. high: the least id beyond it. None: it has no such bound.
    """
    columns, hashes, samples, numbers = [], [], [], []
    first = 0
    for records, ids in _parts(reader):
        rows = np.arange(len(records), dtype=np.uint32)
        for bound, compare in ((low, pc.greater_equal), (high, pc.less)):
            if bound is not None:
                is_inside = compare(ids, pa.scalar(bound, pa.binary()))
                ids, rows = ids.filter(is_inside), rows[is_inside.to_numpy(zero_copy_only=False)]
        columns.append(ids)
        hashes.append(first_64_bits(records["id"], 16)[rows])
        samples.append(records["sample_index"][rows])
        numbers.append(rows + np.uint32(first))
        first += len(records)
    if not numbers:
        return np.zeros(0, dtype=np.uint32)
    of_sample, of_hash, of_row = map(np.concatenate, (samples, hashes, numbers))
    del samples, hashes, numbers
    table = pa.table({"id": pa.chunked_array(columns), "sample": of_sample})
    order = pc.sort_indices(table, sort_keys=_SORT_KEYS).to_numpy()
    del table, columns
    hash_of, sample_of = of_hash[order], of_sample[order]
    is_tie = (hash_of[1:] == hash_of[:-1]) & (sample_of[1:] == sample_of[:-1])
    sorted_range: RowNumbers = of_row[order]
    if is_tie.any():
        _sort_ties(reader, sorted_range, is_tie)
    return sorted_range


def _sort_ties(reader: PartReader, order: RowNumbers, is_tie: npt.NDArray[np.bool_]) -> None:
    """Sort rows with one prompt id and sample number by key, in place.

    Args:
        is_tie: [rows - 1] whether a row has both in common with the next one.
    """
    places = places_of_ties(is_tie)
    # Consecutive ties are one group; a place that has nothing in common with the one before begins the next.
    begins = np.ones(len(places), dtype=bool)
    begins[1:] = ~is_tie[places[1:] - 1]
    keys = reader.gather(order[places], "key")
    order[places] = order[places][np.lexsort((keys, np.cumsum(begins)))]

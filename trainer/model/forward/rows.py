"""Lay documents out as the rows of a forward pass.

Packed: all documents one after the other in a single row; our attention keeps them apart. Unpacked: one
document a row, padded on the right to the longest of a group of similar length. A causal model computes
nothing of a document from the padding after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.model.forward.segment_attention import SegmentGroup, SegmentGroups
from trainer.model.forward.varlen_attention import ATTENTION_NAME as VARLEN
from trainer.model.forward.varlen_attention import DocumentBounds, document_bounds

Segments = SegmentGroups | DocumentBounds


@dataclass(frozen=True, slots=True)
class RotaryBorder:
    """From which length on the rotary embedding of a whole forward pass is another one.

    Attributes:
        tokens: documents up to so many tokens have the same angles whatever their length.
        by_length: the angles of longer documents depend on their length (dynamic scaling); otherwise all of
            them have the same ones (LongRoPE).
    """

    tokens: int
    by_length: bool


@dataclass(frozen=True, slots=True)
class RowLayout:
    """How the documents of a pack become rows of a forward pass.

    Attributes:
        packed: many documents in one row; otherwise one document a row.
        attention: the attention function of transformers to run with; empty: the one that is set.
        one_group: when unpacked, lay the whole pack out in one group, so that every process makes the same
            number of forward passes.
        border: documents on its two sides are computed in passes of their own; None: their length doesn't
            matter.
    """

    packed: bool = True
    attention: str = ""
    one_group: bool = False
    border: RotaryBorder | None = None


PACKED = RowLayout()


def group_starts(lengths: Sequence[int]) -> list[int]:
    """Cut a falling list of lengths where a document is less than half its group's longest."""
    cuts = [0]
    for index, length in enumerate(lengths):
        if length * 2 < lengths[cuts[-1]]:
            cuts.append(index)
    return cuts


def groups(lengths: Sequence[int]) -> list[slice]:
    """Return the groups of a falling list of lengths, as slices of it."""
    return [slice(first, last) for first, last in pairwise([*group_starts(lengths), len(lengths)])]


def parts_of(lengths: Sequence[int], border: RotaryBorder | None) -> list[slice]:
    """Return the parts of a falling list of lengths whose documents may share a forward pass, as slices."""
    if border is None or not lengths or lengths[0] <= border.tokens:
        return [slice(0, len(lengths))]
    longer = sum(length > border.tokens for length in lengths)
    cuts = [*range(longer + 1)] if border.by_length else [0, longer]
    return [slice(first, last) for first, last in pairwise([*cuts, len(lengths)]) if first < last]


def segments_of(lengths: Sequence[int], device: torch.device | str, attention: str = "") -> Segments:
    """Return what our attention needs to keep packed documents apart.

    Args:
        lengths: tokens of each document, falling.
        attention: name of the attention; empty: the variable-length kernel on CUDA, else the grids.
    """
    by_device = VARLEN if torch.device(device).type == "cuda" else ""
    if (attention or by_device) == VARLEN:
        return document_bounds(lengths, device)
    made, begin = [], 0
    for group in groups(lengths):
        made.append(_segment_group(np.asarray(lengths[group], dtype=np.int64), begin, device))
        begin = made[-1].end
    return SegmentGroups(tuple(made))


def packed_arguments(
    documents: Sequence[npt.NDArray[Any]], device: torch.device | str, layout: RowLayout = PACKED
) -> dict[str, Any]:
    """Return the arguments of a forward pass over all documents in one row.

    Args:
        documents: token ids of each, longest first.
    """
    lengths = [len(document) for document in documents]
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    return {
        "input_ids": to_device(np.concatenate(documents).astype(np.int64), device)[None],
        "position_ids": to_device(positions, device)[None],
        "segments": segments_of(lengths, device, layout.attention),
    }


def unpacked_arguments(documents: Sequence[npt.NDArray[Any]], device: torch.device | str) -> dict[str, Any]:
    """Return the arguments of a forward pass with one document a row. Padding repeats a row's first id."""
    longest = max(len(document) for document in documents)
    ids = np.empty((len(documents), longest), dtype=np.int64)
    for row, document in enumerate(documents):
        ids[row] = document[0]
        ids[row, : len(document)] = document
    return {"input_ids": to_device(ids, device)}


def to_device(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Copy an array to a device; to CUDA without making the host wait."""
    made = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        made = made.pin_memory()  # else the copy would wait for its turn
    return made.to(device, non_blocking=True)


def _segment_group(lengths: npt.NDArray[np.int64], begin: int, device: torch.device | str) -> SegmentGroup:
    documents, longest, tokens = len(lengths), int(lengths[0]), int(lengths.sum())
    if int(lengths[-1]) == longest:
        return SegmentGroup(begin, begin + tokens, documents, longest, None, None)
    starts = np.cumsum(lengths) - lengths
    column = np.arange(longest)[None, :]
    real = column < lengths[:, None]
    gather = np.where(real, starts[:, None] + column, starts[:, None]).reshape(-1)
    place = np.flatnonzero(real.reshape(-1))
    return SegmentGroup(
        begin, begin + tokens, documents, longest, to_device(gather, device), to_device(place, device)
    )

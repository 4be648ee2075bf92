"""Turn the examples of one pack into tensors: one row of concatenated documents, no padding, no mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.chat_template import Example
from trainer.model.segment_attention import SegmentGroup
from trainer.model.varlen_attention import DocumentBounds, document_bounds


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of one forward pass.

    Attributes:
        input_ids: [1, tokens] int64, documents one after the other, longest first.
        position_ids: [1, tokens] int64, from 0 in every document.
        predict_at: [supervised] int64, positions whose logits count in the loss: the one before each target.
        targets: [supervised] int64, the token to predict at each of these positions.
        segments: groups of documents for `segment_attention.attend`; on CUDA their bounds, for
            `varlen_attention.attend`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor
    segments: tuple[SegmentGroup, ...] | DocumentBounds

    @property
    def tokens(self) -> int:
        """Tokens fed to the model."""
        return self.input_ids.shape[1]

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return self.targets.shape[0]


def padding_share(packs: Sequence[Sequence[Example]]) -> float:
    """Return the share of padding in the rectangles that attention computes on the CPU, in [0, 1)."""
    cells = tokens = 0
    for pack in packs:
        lengths = sorted((len(e.ids) - 1 for e in pack), reverse=True)
        cuts = _group_starts(lengths)
        for first, last in zip(cuts, [*cuts[1:], len(lengths)], strict=True):
            cells += lengths[first] * (last - first)
        tokens += sum(lengths)
    return 1 - tokens / cells if cells else 0.0


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """Turn the examples of one pack into tensors on `device`.

    The last id of each example is a target only, because nothing is predicted after it. So a document of n
    ids takes n - 1 tokens.
    """
    # Sorted by length, so that attention computes similar lengths in one rectangle.
    documents = sorted(examples, key=lambda e: -len(e.ids))
    lengths = [len(e.ids) - 1 for e in documents]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = np.concatenate([e.ids[:-1] for e in documents]).astype(np.int64)
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    predict_at = np.concatenate(
        [
            np.arange(begin + e.prompt_length - 1, end, dtype=np.int64)
            for e, begin, end in zip(documents, starts[:-1], starts[1:], strict=True)
        ]
    )
    targets = np.concatenate([e.ids[e.prompt_length :] for e in documents]).astype(np.int64)
    return Batch(
        _tensor(ids, device)[None],
        _tensor(positions, device)[None],
        _tensor(predict_at, device),
        _tensor(targets, device),
        document_bounds(lengths, device) if torch.device(device).type == "cuda" else _groups(lengths, device),
    )


def _tensor(array: np.ndarray[tuple[int], np.dtype[np.int64]], device: torch.device | str) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory would block the host
    return tensor.to(device, non_blocking=True)


def _group_starts(lengths: Sequence[int]) -> list[int]:
    """Group descending lengths: a document shorter than half of its group's longest starts a new group."""
    cuts = [0]
    for i, length in enumerate(lengths):
        if length * 2 < lengths[cuts[-1]]:
            cuts.append(i)
    return cuts


def _groups(lengths: Sequence[int], device: torch.device | str) -> tuple[SegmentGroup, ...]:
    cuts = _group_starts(lengths)
    groups = []
    begin = 0
    for first, last in zip(cuts, [*cuts[1:], len(lengths)], strict=True):
        group = _group(np.asarray(lengths[first:last], dtype=np.int64), begin, device)
        groups.append(group)
        begin = group.end
    return tuple(groups)


def _group(
    lengths: np.ndarray[tuple[int], np.dtype[np.int64]], begin: int, device: torch.device | str
) -> SegmentGroup:
    documents, longest, tokens = len(lengths), int(lengths[0]), int(lengths.sum())
    if int(lengths[-1]) == longest:
        return SegmentGroup(begin, begin + tokens, documents, longest, None, None)
    starts = np.cumsum(lengths) - lengths
    column = np.arange(longest)[None, :]
    real = column < lengths[:, None]
    gather = np.where(real, starts[:, None] + column, starts[:, None]).reshape(-1)
    place = np.flatnonzero(real.reshape(-1))
    return SegmentGroup(
        begin, begin + tokens, documents, longest, _tensor(gather, device), _tensor(place, device)
    )

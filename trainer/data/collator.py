"""Lay the examples of one pack out as tensors: rows of documents, and the tokens to predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.data.chat_template import Example
from trainer.model.forward import rows
from trainer.model.forward.rows import PACKED, RowLayout, Segments, to_device
from trainer.model.forward.soft_loss import SoftRows


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass takes. Packed: one row holds all documents. Unpacked: one document a row.

    Attributes:
        input_ids: [rows, tokens] int64. Packed: documents one after the other, longest first.
        position_ids: [1, tokens] int64, from 0 in every document; None where the model counts itself.
        predict_at: [supervised] int64, positions whose logits are judged: one before each target. They count
            through the flattened rows.
        targets: [supervised] int64, the token to predict there.
        weights: [supervised] fp32, how much each target counts; None: all count 1.
        segments: groups of documents for `segment_attention.attend`; on CUDA their bounds, for
            `varlen_attention.attend`; None where the student runs its own attention.
        soft: the teacher's listed tokens for each target; None where no example has any.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    predict_at: torch.Tensor
    targets: torch.Tensor
    segments: Segments | None
    weights: torch.Tensor | None = None
    soft: SoftRows | None = None

    @property
    def tokens(self) -> int:
        """Tokens that pass through the model, padding included."""
        return self.input_ids.numel()

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss."""
        return self.targets.shape[0]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the student's forward."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids, "use_cache": False}
        if self.position_ids is not None:
            arguments["position_ids"] = self.position_ids
        if self.segments is not None:
            arguments["segments"] = self.segments
        return arguments


def padding_share(packs: Sequence[Sequence[Example]]) -> float:
    """Share of the cells that attention lays out, on CPU, and that hold no token, in [0, 1)."""
    cells = tokens = 0
    for pack in packs:
        lengths = sorted((len(e.ids) - 1 for e in pack), reverse=True)
        for group in rows.groups(lengths):
            cells += lengths[group][0] * len(lengths[group])
        tokens += sum(lengths)
    return 1 - tokens / cells if cells else 0.0


def batches(
    examples: Sequence[Example], device: torch.device | str = "cpu", layout: RowLayout = PACKED
) -> list[Batch]:
    """Lay the examples of one pack out as one or more batches, as `layout` says.

    The loss of the pack is the sum of the losses of its batches. All batches together have the documents in
    the order of a single one: longest first.
    """
    documents = sorted(examples, key=lambda e: -len(e.ids))
    parts = rows.parts_of([len(e.ids) - 1 for e in documents], layout.border)
    return [batch for part in parts for batch in _batches_of_part(documents[part], device, layout)]


def _batches_of_part(
    documents: Sequence[Example], device: torch.device | str, layout: RowLayout
) -> list[Batch]:
    """Lay out documents, longest first, that may share a forward pass."""
    if layout.packed:
        return [collate(documents, device, layout)]
    lengths = [len(e.ids) - 1 for e in documents]
    cut = [slice(0, len(documents))] if layout.one_group else rows.groups(lengths)
    return [_unpacked(documents[group], device) for group in cut]


def collate(
    examples: Sequence[Example], device: torch.device | str = "cpu", layout: RowLayout = PACKED
) -> Batch:
    """Lay the examples of one pack out in a single row on `device`.

    The last id of each example is a target only: feeding it would predict nothing, so it is left out of the
    row, and a document of n ids takes n - 1 tokens.
    """
    documents = sorted(examples, key=lambda e: -len(e.ids))  # stable; neighbours share a grid
    lengths = [len(e.ids) - 1 for e in documents]
    arguments = rows.packed_arguments([e.ids[:-1] for e in documents], device, layout)
    return Batch(
        arguments.pop("input_ids"),
        arguments.pop("position_ids"),
        to_device(_predict_at(documents, np.cumsum(lengths) - lengths), device),
        to_device(_targets(documents), device),
        arguments.pop("segments"),
        _weights(documents, device),
        _soft_rows(documents, device),
    )


def _unpacked(documents: Sequence[Example], device: torch.device | str) -> Batch:
    ids = rows.unpacked_arguments([e.ids[:-1] for e in documents], device)["input_ids"]
    starts = np.arange(len(documents), dtype=np.int64) * ids.shape[1]
    predict_at = to_device(_predict_at(documents, starts), device)
    return Batch(
        ids,
        None,
        predict_at,
        to_device(_targets(documents), device),
        None,
        _weights(documents, device),
        _soft_rows(documents, device),
    )


def _predict_at(documents: Sequence[Example], starts: Any) -> Any:
    """Return the flattened positions before each target; `starts` holds each document's first position."""
    return np.concatenate(
        [
            np.arange(begin + e.prompt_length - 1, begin + len(e.ids) - 1, dtype=np.int64)
            for e, begin in zip(documents, starts, strict=True)
        ]
    )


def _weights(documents: Sequence[Example], device: torch.device | str) -> torch.Tensor | None:
    """Return the weight of each target; None where all count 1."""
    if all(e.weight == 1.0 and e.token_weights is None for e in documents):
        return None
    weights = np.array([e.weight for e in documents], dtype=np.float32)
    by_token = np.repeat(weights, [e.supervised for e in documents])
    begin = 0
    for example in documents:
        if example.token_weights is not None:
            by_token[begin : begin + example.supervised] *= example.token_weights
        begin += example.supervised
    return to_device(by_token, device)


def _targets(documents: Sequence[Example]) -> Any:
    return np.concatenate([e.ids[e.prompt_length :] for e in documents]).astype(np.int64)


def _soft_rows(documents: Sequence[Example], device: torch.device | str) -> SoftRows | None:
    """Lay the sparse targets of the documents out as one row for each target."""
    widest = max((e.soft.ids.shape[1] for e in documents if e.soft is not None), default=0)
    if not widest:
        return None
    supervised = sum(e.supervised for e in documents)
    ids = np.zeros((supervised, widest), dtype=np.int64)
    log_probs = np.full((supervised, widest), -np.inf, dtype=np.float32)
    begin = 0
    for example in documents:
        if (soft := example.soft) is not None:
            at, listed = begin + soft.positions, soft.ids.shape[1]
            ids[at] = soft.ids[:, :1]  # unlisted places repeat the first token
            ids[at, :listed] = np.where(np.isinf(soft.log_probs), soft.ids[:, :1], soft.ids)
            log_probs[at, :listed] = soft.log_probs
        begin += example.supervised
    return SoftRows(to_device(ids, device), to_device(log_probs, device))

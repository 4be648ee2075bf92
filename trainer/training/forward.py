"""Compute the loss of one pack, summed over the supervised tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trainer.data.chat_template import Example
from trainer.data.collator import Batch, batches
from trainer.model import structure
from trainer.model.head import Head
from trainer.model.losses import RowLoss, cross_entropy_sum, head_loss, logits_loss, loss_and_gradient
from trainer.model.self_test import StudentForward


def pack_losses(
    student: Any,
    examples: Sequence[Example],
    device: torch.device,
    forward: StudentForward,
    row_loss: RowLoss = loss_and_gradient,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the losses of a pack's batches: one for a packed row, several where rows are not packed.

    A caller that learns runs each backward before it asks for the next, so that the activations of one batch
    exist at a time.

    Args:
        student: a causal language model of transformers, or a PEFT model around one, with the attention of
            `forward.layout` set.
        forward: rows and output layer as the self-test found them.

    Yields:
        As `pack_loss` returns.
    """
    for batch in batches(examples, device, forward.layout):
        yield pack_loss(student, batch, row_loss, head=forward.head)


def pack_loss(
    student: Any, batch: Batch, row_loss: RowLoss = loss_and_gradient, *, head: Head | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the summed loss of a batch and count its correct predictions.

    Args:
        student: a causal language model of transformers, or a PEFT model around one.
        row_loss: loss of a block of logits, e.g. the compiled one from `compile_student`.
        head: scale and cap of the output layer, from `head.find_head`. The layer then runs in chunks, on
            supervised positions only, so the full [supervised, vocabulary] logits never exist. None: the
            student's own forward computes the logits.

    Returns:
        loss (fp32 scalar, nats, summed over supervised tokens by their weights) and correct (int64 scalar).
    """
    base = structure.base_model_of(student)
    layer = base.get_output_embeddings()
    if head is None or layer.weight.requires_grad:
        logits = supervised_logits(student, batch)
        if batch.soft is not None:
            return logits_loss(logits, batch.targets, row_loss, batch.soft, batch.weights)
        return cross_entropy_sum(logits, batch.targets, batch.weights)
    output = structure.backbone(base)(**batch.arguments())
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, batch.predict_at)
    compared = (batch.targets, row_loss, head, batch.weights, batch.soft)
    return head_loss(hidden, layer.weight, layer.bias, *compared)


def supervised_logits(student: Any, batch: Batch) -> torch.Tensor:
    """Run the student's own forward on a batch.

    Returns:
        Logits [supervised, vocabulary], in the model's dtype.
    """
    is_row = batch.input_ids.shape[0] == 1
    kept = {"logits_to_keep": batch.predict_at} if is_row and _takes_logits_to_keep(student) else {}
    logits: torch.Tensor = student(**batch.arguments(), **kept).logits.flatten(0, 1)
    return logits if kept else logits.index_select(0, batch.predict_at)


def _takes_logits_to_keep(student: Any) -> bool:
    code = type(structure.base_model_of(student)).forward
    return "logits_to_keep" in inspect.signature(code).parameters

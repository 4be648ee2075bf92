"""Compute the loss of one pack, summed over the supervised tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.chat_template import Example
from trainer.data.collator import Batch, batches
from trainer.model import structure
from trainer.model.forward.head import Head
from trainer.model.forward.losses import (
    DEFAULT_MIX,
    PLAIN_HEAD,
    RowLoss,
    cross_entropy_sum,
    head_loss,
    logits_loss,
    loss_and_gradient,
)
from trainer.model.forward.soft_loss import SoftMix, SoftRows, soft_losses_and_gradient
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


class TokenScores(NamedTuple):
    """What a student says of the supervised tokens of an example.

    Attributes:
        log_probs: [supervised] fp32, log-probability of each.
        divergences: [supervised] fp32, loss of each by a `SoftMix`; NaN where there is no soft target.
    """

    log_probs: npt.NDArray[np.float32]
    divergences: npt.NDArray[np.float32]


@torch.no_grad()
def token_scores(
    student: Any,
    examples: Sequence[Example],
    device: torch.device,
    forward: StudentForward,
    mix: SoftMix = DEFAULT_MIX,
) -> list[TokenScores]:
    """Compute the log-probability of each supervised token of a pack, and its divergence from soft targets.

    Returns:
        one for each example, in their order.
    """
    layer = structure.base_model_of(student).get_output_embeddings()
    found: list[torch.Tensor] = []
    for batch in batches(examples, device, forward.layout):
        if forward.head is None or layer.weight.requires_grad:
            logits = supervised_logits(student, batch).float()
            found.append(_scores(logits, batch.targets, batch.soft, mix))
            continue
        pack_loss(student, batch, _collecting(found, mix), head=forward.head)
    every = torch.cat(found).cpu().numpy() if found else np.zeros((0, 2), dtype=np.float32)
    # Batches lay documents out longest first, as `collator.batches` does.
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number].ids))
    ends = np.cumsum([examples[number].supervised for number in order])
    parts = dict(zip(order, np.split(every, ends[:-1]), strict=True)) if order else {}
    return [TokenScores(*parts[number].T) for number in range(len(examples))]


def _collecting(found: list[torch.Tensor], mix: SoftMix) -> RowLoss:
    """Return a loss of a block of logits that keeps the scores of the targets."""

    def collect(  # noqa: PLR0913 - as `loss_and_gradient`
        outputs: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        head: Head = PLAIN_HEAD,
        weights: torch.Tensor | None = None,
        soft: SoftRows | None = None,
        mix: SoftMix = mix,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = outputs * head.scale
        if head.cap is not None:
            logits = (logits / head.cap).tanh() * head.cap
        correct = (logits.argmax(dim=-1) == targets).sum()
        scores = _scores(logits, targets, soft, mix)
        found.append(scores)
        return -scores[:, 0].sum(), correct, outputs.to(dtype)

    return collect


def _scores(logits: torch.Tensor, targets: torch.Tensor, soft: SoftRows | None, mix: SoftMix) -> torch.Tensor:
    """Return [rows, 2]: log-probability of the target, divergence. The logits are overwritten."""
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    log_probs = logits.gather(1, targets[:, None]) - log_total
    unknown = torch.full_like(log_probs, torch.nan)
    if soft is None:
        return torch.cat([log_probs, unknown], dim=-1)
    losses, _ = soft_losses_and_gradient(logits, log_total, targets, soft, mix)
    divergences = torch.where(torch.isinf(soft.log_probs[:, :1]), unknown, losses)
    return torch.cat([log_probs, divergences], dim=-1)


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

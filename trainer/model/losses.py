"""Losses as sums, so that the caller divides once by the supervised tokens of the whole step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from trainer.model.lora_kernel import matmul_as

RowLoss = Callable[[torch.Tensor, torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

CHUNK_ROWS = 1024  # rows of logits alive at once: 1024 x 152k x 4 bytes is 0.6 GB


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy and the number of correct first guesses.

    Args:
        logits: [supervised, vocabulary], any float dtype; the loss is computed in fp32.
        targets: [supervised] int64 token ids.

    Returns:
        loss (fp32 scalar, natural log, summed) and correct (int64 scalar, no gradient, no host sync).
    """
    wide = logits.float()
    correct = (wide.detach().argmax(dim=-1) == targets).sum()
    return functional.cross_entropy(wide, targets, reduction="sum"), correct


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    judge: RowLoss | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cross_entropy_sum` of a frozen output layer, in chunks: no [supervised, vocabulary] tensor is kept.

    The gradient of `hidden` is made in the forward pass, where the logits are at hand (4 V H FLOP a row
    instead of 6), and scaled in the backward pass; the frozen weight gets none.

    Args:
        hidden: [supervised, width]. weight: [vocabulary, width], frozen. bias: [vocabulary], frozen.
        judge: a faster `judge_rows`, where there is one.
    """
    loss, correct = _HeadLoss.apply(hidden, weight, bias, targets, judge or loss_and_gradient)  # type: ignore[no-untyped-call]
    return loss, correct


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, bias, targets, judge = args
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wanted else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for begin in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            logits = matmul_as(hidden[rows], weight.t(), torch.float32)
            if bias is not None:
                logits += bias
            part, right, share = judge(logits, targets[rows], weight.dtype)
            loss += part
            correct += right
            if slope is not None:
                slope[rows] = share @ weight
        ctx.slope = slope
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        return grads[0].to(ctx.slope.dtype) * ctx.slope, None, None, None, None


def loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed loss, right guesses, and the loss's gradient by the logits in `dtype`.

    Args:
        logits: [rows, vocabulary] fp32; overwritten. targets: [rows] int64.
    """
    correct = (logits.argmax(dim=-1) == targets).sum()
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    loss = (total - logits.gather(1, targets[:, None])).sum()
    share = logits.sub_(total).exp_()
    share.scatter_add_(1, targets[:, None], share.new_full((len(targets), 1), -1.0))
    return loss, correct, share.to(dtype)

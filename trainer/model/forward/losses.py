"""Compute the training loss as a sum, so that the caller divides once by the tokens of the whole step."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from trainer.model.forward.head import Head
from trainer.model.forward.lora_kernel import matmul_as
from trainer.model.forward.soft_loss import SoftMix, SoftRows, soft_losses_and_gradient


class RowLoss(Protocol):
    """Compute the loss of a block of logits; the signature of `loss_and_gradient`."""

    def __call__(  # noqa: PLR0913 - as `loss_and_gradient`
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        head: Head = ...,
        weights: torch.Tensor | None = None,
        soft: SoftRows | None = None,
        mix: SoftMix = ...,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, correct and gradient."""


DEFAULT_MIX = SoftMix()

PLAIN_HEAD = Head()

# Rows of logits that exist at the same time: 1,024 rows x 152k vocabulary x 4 bytes are 0.6 GB.
CHUNK_ROWS = 1024


def cross_entropy_sum(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross-entropy over all rows, each times its weight, and count the correct predictions.

    Args:
        logits: [supervised, vocabulary], any float dtype; the loss is computed in fp32, of fp64 in fp64.
        targets: [supervised] int64 token ids.
        weights: [supervised], how much each row counts in the loss; None: all count 1.

    Returns:
        loss (fp32 scalar, nats, summed) and correct (int64 scalar, no gradient). Neither makes the host wait.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    correct = (wide.detach().argmax(dim=-1) == targets).sum()
    if weights is not None:
        losses = functional.cross_entropy(wide, targets, reduction="none")
        return (losses * weights).sum(), correct
    return functional.cross_entropy(wide, targets, reduction="sum"), correct


def loss_and_gradient(  # noqa: PLR0913 - the logits, what they are compared with, and how
    outputs: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype,
    head: Head = PLAIN_HEAD,
    weights: torch.Tensor | None = None,
    soft: SoftRows | None = None,
    mix: SoftMix = DEFAULT_MIX,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute cross-entropy of a block of the output layer's results, together with its gradient.

    Where there are soft targets, the loss is the mixture that `soft_loss` describes.

    The gradient for the logits is softmax(logits) - one_hot. With y = c tanh(s x / c) the gradient for x is
    that of y times s (1 - (y / c)^2).

    Args:
        outputs: x, [rows, vocabulary] fp32; overwritten.
        targets: [rows] int64 token ids.
        dtype: dtype of the returned gradient.
        head: scale s and cap c between the output layer and the logits.
        weights: [rows] fp32, factor on each row's loss and gradient; None: all count 1.
        soft: the teacher's listed tokens; None: cross-entropy only.
        mix: how the two are mixed.

    Returns:
        loss (fp32 scalar, nats, summed), correct (int64 scalar), gradient [rows, vocabulary] in `dtype`.
    """
    logits = outputs if head.scale == 1.0 else outputs.mul_(head.scale)
    slope = None
    if head.cap is not None:
        share = logits.div_(head.cap).tanh_()
        slope = 1 - share.square()
        logits = share.mul_(head.cap)
    correct = (logits.argmax(dim=-1) == targets).sum()
    log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
    if soft is None:
        losses = log_total - logits.gather(1, targets[:, None])
        gradient = logits.sub_(log_total).exp_()
        gradient.scatter_add_(1, targets[:, None], gradient.new_full((len(targets), 1), -1.0))
    else:
        losses, gradient = soft_losses_and_gradient(logits, log_total, targets, soft, mix)
    loss = losses.sum() if weights is None else (losses * weights[:, None]).sum()
    if slope is not None:
        gradient.mul_(slope)
    if head.scale != 1.0:
        gradient.mul_(head.scale)
    if weights is not None:
        gradient.mul_(weights[:, None])
    return loss, correct, gradient.to(dtype)


def head_loss(  # noqa: PLR0913 - the layer, what it is compared with, and how
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    row_loss: RowLoss = loss_and_gradient,
    head: Head = PLAIN_HEAD,
    weights: torch.Tensor | None = None,
    soft: SoftRows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply a frozen output layer and compute the loss in chunks of `CHUNK_ROWS` rows.

    The whole [supervised, vocabulary] tensor never exists. The gradient of `hidden` is computed in the
    forward pass, while the logits of a chunk are at hand (4 V H FLOP a row instead of 6 with recomputation),
    and only scaled in the backward pass. The same idea is in Liger Kernel's fused linear cross entropy
    (Hsu et al. 2024, arXiv 2410.10989).

    Args:
        hidden: [supervised, width], any float dtype.
        weight: [vocabulary, width], frozen: it gets no gradient.
        bias: [vocabulary], frozen, or None.
        targets: [supervised] int64 token ids.
        row_loss: computes loss and gradient of a chunk; a compiled one may be passed.
        head: scale and soft cap between the output layer and the logits.
        weights: [supervised] fp32, how much each row counts in the loss; None: all count 1.
        soft: the teacher's listed tokens at each supervised position; None: cross-entropy only.

    Returns:
        As `cross_entropy_sum`.
    """
    each = (targets, row_loss, head, weights, soft)
    loss, correct = _HeadLoss.apply(hidden, weight, bias, *each)  # type: ignore[no-untyped-call]
    return loss, correct


def logits_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_loss: RowLoss,
    soft: SoftRows,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss with soft targets from logits that a student's own forward made.

    Args:
        logits: [supervised, vocabulary], any float dtype; computed in fp32, or in fp64 if they are.

    Returns:
        As `cross_entropy_sum`.
    """
    loss, correct = _LogitsLoss.apply(logits, targets, row_loss, soft, weights)  # type: ignore[no-untyped-call]
    return loss, correct


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, targets, row_loss, soft, weights = args
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        loss, correct, ctx.gradient = row_loss(wide, targets, wide.dtype, PLAIN_HEAD, weights, soft)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (ctx.gradient * grads[0]).to(ctx.dtype), *[None] * 4


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, weight, bias, targets, row_loss, head, weights, soft = args
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for begin in range(0, hidden.shape[0], CHUNK_ROWS):
            rows = slice(begin, begin + CHUNK_ROWS)
            logits = matmul_as(hidden[rows], weight.t(), torch.float32)
            if bias is not None:
                logits += bias
            of_chunk = (
                targets[rows],
                weight.dtype,
                head,
                None if weights is None else weights[rows],
                None if soft is None else soft.part(rows),
            )
            chunk_loss, chunk_correct, gradient = row_loss(logits, *of_chunk)
            loss += chunk_loss
            correct += chunk_correct
            if hidden_gradient is not None:
                hidden_gradient[rows] = gradient @ weight
        ctx.hidden_gradient = hidden_gradient
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = ctx.hidden_gradient
        # In fp32: 1 / tokens rounded to bf16 would scale all gradients of a step by up to 0.4 %.
        return (gradient.float() * grads[0]).to(gradient.dtype), *[None] * 7

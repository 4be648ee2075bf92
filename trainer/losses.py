"""Losses as sums, so that the caller divides once by the supervised tokens of the whole step."""

from __future__ import annotations

import torch
from torch.nn import functional


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

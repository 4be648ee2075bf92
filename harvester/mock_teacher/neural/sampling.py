"""Choose the next token of each row of a batch, from its own logits and its own random numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def choose(
    logits: torch.Tensor, temperatures: Sequence[float], top_p: Sequence[float], draws: Sequence[float]
) -> torch.Tensor:
    """Return one token id for each row of `logits` (rows, vocabulary).

    Temperature 0 is greedy. Otherwise the smallest set of likeliest tokens with mass `top_p` is sampled by
    inverse transform: `draws` holds one uniform number in [0, 1) for each row.
    """
    greedy = logits.argmax(dim=-1)
    if not any(temperatures):
        return greedy
    warm = torch.tensor(temperatures, dtype=torch.float64)
    scaled = logits.double() / warm.clamp_min(1e-6)[:, None]
    shares, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(dim=-1) - shares
    kept = shares * (before < torch.tensor(top_p, dtype=torch.float64)[:, None])
    kept[:, 0] = shares[:, 0]  # top_p 0 keeps the likeliest token
    ends = kept.cumsum(dim=-1)
    targets = torch.tensor(draws, dtype=torch.float64)[:, None] * ends[:, -1:]
    at = torch.searchsorted(ends, targets, right=True).clamp_max((kept > 0).sum(dim=-1, keepdim=True) - 1)
    return torch.where(warm > 0, order.gather(1, at).squeeze(1), greedy)

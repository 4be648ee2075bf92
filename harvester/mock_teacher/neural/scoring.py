"""Score given texts: the log-probability of each token after those before it, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Most tokens, padding included, that are scored in one forward pass.
MAX_PASS_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What the model says at one position: its log-probability, its rank from 1, and the likeliest tokens."""

    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A text to score. `done` gets a score for every token but the first, which has none.

    Both callbacks are called in the model's thread.
    """

    ids: Sequence[int]
    top: int
    done: Callable[[list[TokenScore]], None]
    failed: Callable[[Exception], None]


def score_rows(model: Any, rows: Sequence[ScoredRow]) -> None:
    """Score rows, in passes of texts of similar length; a row that fails does not stop the others."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    while ordered:
        width = len(ordered[0].ids)
        count = 0
        while count < len(ordered) and (count + 1) * len(ordered[count].ids) <= max(MAX_PASS_TOKENS, width):
            count += 1
        group, ordered = ordered[:count], ordered[count:]
        try:
            scores = _scores(model, group)
        except Exception as error:  # noqa: BLE001 - whatever a model raises fails its rows, not the server
            for row in group:
                row.failed(error)
        else:
            for row, each in zip(group, scores, strict=True):
                row.done(each)


@torch.inference_mode()
def _scores(model: Any, rows: Sequence[ScoredRow]) -> list[list[TokenScore]]:
    """Return the scores of each row. Padding is on the right, where no token of a row can see it."""
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        mask[at, : len(row.ids)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    result = []
    for at, row in enumerate(rows):
        every = logits[at, : len(row.ids) - 1].float().log_softmax(dim=-1)
        own = every.gather(1, torch.tensor(row.ids[1:], dtype=torch.long)[:, None])
        ranks = (every > own).sum(dim=-1) + 1
        values, order = every.topk(min(row.top, every.size(1)), dim=-1)
        facts = zip(own.squeeze(1).tolist(), ranks.tolist(), order.tolist(), values.tolist(), strict=True)
        result.append([TokenScore(*fact) for fact in facts])
    return result

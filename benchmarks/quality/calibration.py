"""Measure how well a student predicts right answers, and how sure it is of them.

For every held-out prompt the student reads the right answer. Per token: its loss, its highest probability
(the confidence), and whether the likeliest token is the right one. `FEATURES` are sums of these over an
answer, so that totals over any set of prompts give the loss and the expected calibration error (Guo et al.
2017, arXiv 1706.04599, 15 bins of equal width).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

BINS = 15
# Features of a prompt: loss, tokens; then for each bin the confidence and the right tokens, summed.
FEATURES = 2 + 2 * BINS
# Answers that are read in one forward pass.
PACK = 64

Array = npt.NDArray[np.float64]


def loss(totals: Array) -> Array:
    """Return nats per token of the right answers."""
    return totals[..., 0] / totals[..., 1]


def error(totals: Array) -> Array:
    """Return the expected calibration error: the mean gap between confidence and accuracy of the bins."""
    confidence, right = totals[..., 2 : 2 + BINS], totals[..., 2 + BINS :]
    return np.abs(confidence - right).sum(axis=-1) / totals[..., 1]


def measure(student: Any, config: Any, renderer: Any, held_out: Sequence[Any]) -> dict[str, list[float]]:
    """Return the features of each held-out prompt by its id.

    Args:
        student: base and adapter.
        config, renderer: of the student: a `TrainConfig` and a `chat_template.Renderer`.
        held_out: `HeldOut` prompts with references.
    """
    import torch

    from trainer.data.collator import batches
    from trainer.data.held_out import held_out_examples
    from trainer.model import self_test
    from trainer.training.forward import supervised_logits

    taught = [replace(held, target_answer=held.reference) for held in held_out]
    examples = held_out_examples(taught, renderer, config)
    forward = self_test.check_student(student, config.base)
    # A pack lays its longest example first: sorted here, so that rows of logits are found again.
    numbers = sorted(range(len(examples)), key=lambda number: -len(examples[number].ids))
    features: dict[str, list[float]] = {}
    with torch.no_grad(), self_test.attention_of(student, forward.layout):
        for first in range(0, len(numbers), PACK):
            pack = numbers[first : first + PACK]
            rows: list[Any] = []
            for batch in batches([examples[n] for n in pack], "cpu", forward.layout):
                rows.append(_token_figures(supervised_logits(student, batch), batch.targets))
            figures, at = np.concatenate(rows), 0
            for number in pack:
                tokens = examples[number].supervised
                features[held_out[number].prompt_id] = _summed(figures[at : at + tokens])
                at += tokens
    return features


def _token_figures(logits: Any, targets: Any) -> Array:
    """Return [tokens, 3]: loss, confidence, and 1 where the likeliest token is the target."""
    log_probs = logits.float().log_softmax(dim=-1)
    confidence, likeliest = log_probs.max(dim=-1)
    losses = -log_probs.gather(1, targets[:, None])[:, 0]
    columns = [losses, confidence.exp(), (likeliest == targets).float()]
    return np.stack([column.double().numpy() for column in columns], axis=1)


def _summed(figures: Array) -> list[float]:
    bins = np.minimum((figures[:, 1] * BINS).astype(int), BINS - 1)
    confidence = np.bincount(bins, figures[:, 1], minlength=BINS)
    right = np.bincount(bins, figures[:, 2], minlength=BINS)
    return [round(float(value), 9) for value in (figures[:, 0].sum(), len(figures), *confidence, *right)]

"""Measure what probability a model gives the teacher's answers: loss, perplexity, bits per byte, calibration.

One forward pass over the held-out answers serves all of them. Calibration is that of the next token: how
often the token that the model thinks likeliest is the teacher's, against how likely it thinks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import TrainConfig
from trainer.data.chat_template import Example
from trainer.data.collator import batches
from trainer.data.packing import pack
from trainer.evaluation import intervals, on_demand
from trainer.model import self_test
from trainer.model.forward.head import Head
from trainer.model.forward.losses import DEFAULT_MIX, PLAIN_HEAD
from trainer.model.forward.soft_loss import SoftMix, SoftRows
from trainer.training.forward import pack_losses, supervised_logits

Values = NDArray[np.float64]
BINS = 15


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Hold what a model thinks of the supervised tokens of some examples.

    Attributes:
        nats: [examples] negative log-probability of each example, summed over its tokens.
        tokens: [examples] supervised tokens.
        confidence: [examples, BINS] sum of the largest probability of each token, by bin of it.
        correct: [examples, BINS] how many of those likeliest tokens were the teacher's.
        counts: [examples, BINS] tokens.
    """

    nats: Values
    tokens: Values
    confidence: Values
    correct: Values
    counts: Values

    @property
    def loss(self) -> float:
        """Nats per supervised token."""
        return float(self.nats.sum() / self.tokens.sum())

    def part(self, examples: slice | Sequence[int]) -> Likelihood:
        """Return what is known of some of the examples, whose places rise."""
        if not isinstance(examples, slice) and len(examples) == len(self.nats):
            return self  # places rise, so these are all
        columns = (self.nats, self.tokens, self.confidence, self.correct, self.counts)
        return Likelihood(*(column[examples] for column in columns))


class _Recorder:
    """Take the place of the training's loss of a block of logits, and keep what it says of each token."""

    def __init__(self) -> None:
        self.nats: list[torch.Tensor] = []
        self.confidence: list[torch.Tensor] = []
        self.is_correct: list[torch.Tensor] = []

    def __call__(  # noqa: PLR0913 - as `loss_and_gradient`
        self,
        outputs: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        head: Head = PLAIN_HEAD,
        weights: torch.Tensor | None = None,
        soft: SoftRows | None = None,
        mix: SoftMix = DEFAULT_MIX,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.record(head.logits(outputs), targets)
        nothing = torch.zeros((), device=outputs.device)
        return nothing, nothing.long(), outputs  # without gradients nobody asks for them

    def record(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep loss, confidence and correctness of each row of logits."""
        total = torch.logsumexp(logits.float(), dim=-1)
        best, likeliest = logits.float().max(dim=-1)
        self.nats.append((total - logits.float().gather(1, targets[:, None])[:, 0]).double().cpu())
        self.confidence.append((best - total).exp().double().cpu())
        self.is_correct.append((likeliest == targets).double().cpu())

    def take(self) -> tuple[Values, Values, Values]:
        """Return nats, confidence and correctness of all tokens so far, and forget them."""
        columns = (self.nats, self.confidence, self.is_correct)
        taken = tuple(np.asarray(torch.cat(column).numpy(), dtype=np.float64) for column in columns)
        for column in columns:
            column.clear()
        return taken[0], taken[1], taken[2]


def measure(answering: Any, examples: Sequence[Example], config: TrainConfig) -> Likelihood | None:
    """Let a model read examples. Weights of rows and soft targets don't count here.

    Args:
        answering: the model; its parameters are frozen.

    Returns:
        None without examples.
    """
    if not examples:
        return None
    nats = np.zeros(len(examples))
    binned = np.zeros((3, len(examples), BINS))
    _read(answering, examples, config, partial(_add, nats, binned))
    tokens = np.array([e.supervised for e in examples], dtype=np.float64)
    return Likelihood(nats, tokens, *binned)


def losses(answering: Any, examples: Sequence[Example], config: TrainConfig) -> Values:
    """Let a model read examples, which may be millions; keep the loss of each alone.

    Args:
        answering: as of `measure`.

    Returns:
        [examples] nats per supervised token, the same as `measure` finds.
    """
    nats = np.zeros(len(examples))
    if len(examples):
        _read(answering, examples, config, lambda of_tokens, owners: np.add.at(nats, owners, of_tokens[0]))
    return nats / np.fromiter((e.supervised for e in examples), np.float64, len(examples))


def _read(
    answering: Any,
    examples: Sequence[Example],
    config: TrainConfig,
    add: Callable[[tuple[Values, ...], NDArray[np.int64]], None],
) -> None:
    """Let a model read examples pack by pack.

    Args:
        add: called for each pack: nats, confidence and correctness of its tokens, and the example of each.
    """
    device = next(answering.parameters()).device
    answering.requires_grad_(False)  # the loss of a frozen head needs no full logits
    forward = self_test.check_student(answering, config.base)
    recorder = _Recorder()
    lengths = np.fromiter((len(e.ids) - 1 for e in examples), np.int32, len(examples))
    packing = pack(lengths, config.train.pack_budget)
    with torch.no_grad(), self_test.attention_of(answering, forward.layout):
        for number in range(len(packing)):
            numbers = packing.pack(number)
            packed = [examples[i] for i in numbers]
            if forward.head is None:
                _record_logits(recorder, answering, packed, device, forward)
            else:
                for _ in pack_losses(answering, packed, device, forward, recorder):
                    pass
            add(recorder.take(), _owners(packed, numbers))


def measure_parts(
    answering: Any, parts: Sequence[Sequence[Example]], config: TrainConfig
) -> list[Likelihood | None]:
    """Let a model read several sets of examples in one pass; None for an empty set."""
    measured = measure(answering, on_demand.joined(parts), config)
    found: list[Likelihood | None] = []
    begin = 0
    for part in parts:
        found.append(measured.part(slice(begin, begin + len(part))) if measured and part else None)
        begin += len(part)
    return found


def _record_logits(
    recorder: _Recorder, answering: Any, examples: Sequence[Example], device: torch.device, forward: Any
) -> None:
    """Record what a model says whose own forward must compute the logits."""
    for batch in batches(examples, device, forward.layout):
        recorder.record(supervised_logits(answering, batch), batch.targets)


def _owners(packed: Sequence[Example], numbers: Sequence[int]) -> NDArray[np.int64]:
    """Return for each token of a pack the number of its example, in the collator's order: longest first."""
    ordered = sorted(range(len(packed)), key=lambda place: -len(packed[place].ids))
    of_places = np.array([numbers[place] for place in ordered], dtype=np.int64)
    return np.repeat(of_places, [packed[place].supervised for place in ordered])


def _add(
    nats: Values, binned: NDArray[np.float64], of_tokens: tuple[Values, ...], owners: NDArray[np.int64]
) -> None:
    token_nats, confidence, is_correct = of_tokens
    np.add.at(nats, owners, token_nats)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    for place, values in enumerate((confidence, is_correct, np.ones_like(confidence))):
        np.add.at(binned[place], (owners, bins), values)


def summary(likelihood: Likelihood, text_bytes: Sequence[int], resamples: int) -> dict[str, Any]:
    """Return nats per token, perplexity and bits per byte with intervals over prompts.

    Args:
        text_bytes: UTF-8 bytes of each answer. Bits per byte compare models with different tokenizers.
    """
    sums = np.stack([likelihood.nats, likelihood.tokens, np.array(text_bytes, dtype=np.float64)], axis=1)
    drawn, whole = intervals.resampled_sums(sums, resamples), sums.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        nats, nats_drawn = whole[0] / whole[1], drawn[:, 0] / drawn[:, 1]
        bits, bits_drawn = (
            np.divide(whole[0], whole[2] * math.log(2)),
            drawn[:, 0] / (drawn[:, 2] * math.log(2)),
        )
        return {
            "nats_per_token": intervals.estimate(float(nats), nats_drawn),
            "perplexity": intervals.estimate(float(np.exp(nats)), np.exp(nats_drawn)),
            "bits_per_byte": intervals.estimate(float(bits), bits_drawn),
        }


def calibration(likelihood: Likelihood, resamples: int) -> dict[str, Any]:
    """Return the expected calibration error (Guo et al. 2017) over 15 equal bins, with its interval.

    The error of a perfectly calibrated model is above 0 by chance, most in small samples. The interval is
    that of resampled prompts, so it holds this excess too.

    Returns:
        `ece` {value, low, high}; `bins`: for each used one its tokens, mean confidence and share correct.
    """
    sums = np.concatenate([likelihood.confidence, likelihood.correct, likelihood.counts], axis=1)
    drawn, whole = intervals.resampled_sums(sums, resamples), sums.sum(axis=0, keepdims=True)
    confidence, correct, counts = whole[0].reshape(3, BINS)
    used = counts > 0
    return {
        "ece": intervals.estimate(float(_ece(whole)[0]), _ece(drawn)),
        "tokens": int(counts.sum()),
        "correct": float(correct.sum() / counts.sum()),
        "confidence": float(confidence.sum() / counts.sum()),
        "bins": [
            {"tokens": int(n), "confidence": float(c / n), "correct": float(r / n)}
            for n, c, r in zip(counts[used], confidence[used], correct[used], strict=True)
        ],
    }


def compared(
    measured: Mapping[str, Likelihood], text_bytes: Sequence[int], numbers: Sequence[int], resamples: int
) -> dict[str, Any]:
    """Return the figures of some of the answers for base and student, side by side.

    Args:
        numbers: of the answers.

    Returns:
        `answers`; by model what `summary` returns, and `ece`; `student_minus_base.bits_per_byte`.
    """
    parts = {name: each.part(numbers) for name, each in measured.items()}
    sizes = [text_bytes[n] for n in numbers]
    fewer_bits = (parts["student"].nats - parts["base"].nats) / math.log(2)
    return {
        "answers": len(numbers),
        **{
            name: {**summary(part, sizes, resamples), "ece": calibration(part, resamples)["ece"]}
            for name, part in parts.items()
        },
        "student_minus_base": {"bits_per_byte": intervals.ratio(fewer_bits.tolist(), sizes, resamples)},
    }


def _ece(sums: Values) -> Values:
    """Return the error of each row of sums: |confidence - correct| of the bins, weighted by their tokens."""
    confidence, correct, counts = np.split(sums, 3, axis=1)
    return np.asarray(np.abs(confidence - correct).sum(axis=1) / counts.sum(axis=1), dtype=np.float64)

"""Compute the loss on sparse soft targets: cross-entropy mixed with a KL divergence over k + 1 events.

A teacher's API lists k tokens of a distribution. The events are these tokens and one more, "any other token",
whose probability is what the listed ones leave. With p of the teacher and q of the student over the events,

    loss = (1 - w) * CE(target) + w * T^2 * KL(p^(1/T) || q^(1/T))    (both renormalised over the events)

which is the mixture of Hinton et al. 2015 (arXiv 1503.02531, section 2) on the coarser distribution. The tail
event keeps the student from taking the listed tokens for the whole distribution. Renormalising the listed
tokens instead (`tail = "renormalise"`) is biased: it teaches a confidence that the teacher doesn't have
(Anshumann et al. 2025, arXiv 2503.16870).

The temperature T acts on the events. A temperature on the whole vocabulary would need the probability of each
unlisted token, which nobody knows; at T = 1 the two are the same.

`direction = "reverse"` is KL(q || p) instead, for text that the student itself wrote: the divergence that
on-policy distillation minimises, summed over the events instead of estimated from the one token that was
sampled. Its expectation is the same but for what the tail takes together, its variance far lower (Rao and
Blackwell; Amini et al. 2025, arXiv 2504.10637). For log q_e the gradient is q_e (log q_e - log p_e - KL).

The student's tail is summed over the unlisted tokens. This equals log1mexp(logsumexp(listed)), without its
cancellation when the listed tokens hold almost everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

Tail = Literal["bucket", "renormalise"]
Direction = Literal["forward", "reverse"]

# Least log-probability of a teacher's event in the reverse direction, which has no finite value at zero. The
# tail is one minus a sum of float16 values, whose rounding is about 1e-4.
LEAST_TAIL = 1e-4
LEAST_LOG_PROB = -30.0


@dataclass(frozen=True, slots=True)
class SoftMix:
    """How cross-entropy and KL divergence are mixed.

    Attributes:
        weight: w, share of the KL divergence at positions with soft targets, 0 to 1.
        temperature: T; 1 for `tail` "renormalise".
        tail: "bucket" for k + 1 events, "renormalise" for the biased variant without the tail.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher), which needs the
            tail.
    """

    weight: float = 0.5
    temperature: float = 1.0
    tail: Tail = "bucket"
    direction: Direction = "forward"


class SoftRows(NamedTuple):
    """The teacher's listed tokens for each supervised position.

    Attributes:
        ids: [supervised, k] int64, distinct tokens in a row; those without a probability repeat the first.
        log_probs: [supervised, k] fp32, natural logarithm; -inf where nothing is listed. Listed entries come
            first in their row. A row of -inf has no soft target.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    def part(self, rows: slice) -> SoftRows:
        """Return some of the rows."""
        return SoftRows(self.ids[rows], self.log_probs[rows])


def teacher_events(log_probs: torch.Tensor, mix: SoftMix) -> torch.Tensor:
    """Return the teacher's log-probabilities of the events, [rows, k + 1], at the mix's temperature.

    Listed probabilities that sum to more than 1 are scaled to 1, and the tail is 0.
    """
    left = (1 - log_probs.exp().sum(dim=-1, keepdim=True)).clamp_min(0)
    if mix.tail == "renormalise":
        left = torch.where(torch.isinf(log_probs[:, :1]), 1.0, 0.0)  # rows without soft targets stay finite
    if mix.direction == "reverse":
        left = left.clamp_min(LEAST_TAIL)
    events = torch.cat([log_probs, left.log()], dim=-1)
    return torch.log_softmax(events / mix.temperature, dim=-1)


def soft_losses_and_gradient(
    logits: torch.Tensor, log_total: torch.Tensor, targets: torch.Tensor, soft: SoftRows, mix: SoftMix
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the mixed loss of a block of logits, together with its gradient.

    For an event e, T^2 KL has the gradient T (q_e - p_e) for log q_e, p and q at temperature T; that of the
    reverse direction is T q_e (log q_e - log p_e - KL). A listed token is an event of its own; an unlisted
    token j of probability s_j takes s_j / s_tail of the tail's.

    Args:
        logits: [rows, vocabulary]; overwritten by the gradient.
        log_total: [rows, 1], logsumexp of the logits.
        targets: [rows] int64 token ids.

    Returns:
        losses [rows, 1] in nats and gradient [rows, vocabulary], in the logits' dtype.
    """
    log_probs = soft.log_probs.to(logits.dtype)
    listed = ~torch.isinf(log_probs)
    weight = listed[:, 0].to(logits.dtype) * mix.weight
    entropy = (log_total - logits.gather(1, targets[:, None]))[:, 0]
    log_listed = logits.gather(1, soft.ids) - log_total
    q = logits.sub_(log_total).exp_()
    q.scatter_(1, soft.ids, 0.0)
    rest = q.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    p_log = teacher_events(log_probs, mix)
    if mix.tail == "renormalise":
        p_log, q_log = p_log[:, :-1], log_listed
        terms = _terms(p_log, q_log)
        slope = log_listed.exp() - p_log.exp()
        tail_slope = torch.ones_like(rest)
    else:
        events = torch.cat([log_listed.masked_fill(~listed, -torch.inf), rest.log()], dim=-1)
        q_log = torch.log_softmax(events / mix.temperature, dim=-1)
        if mix.direction == "reverse":
            p_log = p_log.clamp_min(LEAST_LOG_PROB)
            terms = _terms(q_log, p_log)
            slope = mix.temperature * (terms - q_log.exp() * terms.sum(dim=-1, keepdim=True))
        else:
            terms = _terms(p_log, q_log)
            slope = mix.temperature * (q_log.exp() - p_log.exp())
        tail_slope = slope[:, -1:] / rest
        slope = slope[:, :-1]
    divergence = mix.temperature**2 * terms.sum(dim=-1)
    losses = (1 - weight) * entropy + torch.where(weight > 0, weight * divergence, 0.0)

    # The first column is put back in every row: without soft targets it holds a token of its own.
    is_first = torch.zeros_like(listed)
    is_first[:, 0] = True
    share = weight[:, None]
    of_listed = (1 - share) * log_listed.exp() + torch.where(listed, share * slope, 0.0)
    q.mul_((1 - share) + torch.where(share > 0, share * tail_slope, 0.0))
    q.scatter_add_(1, soft.ids, torch.where(listed | is_first, of_listed, 0.0))
    q.scatter_add_(1, targets[:, None], -(1 - share))
    return losses[:, None], q


def _terms(of_log: torch.Tensor, other_log: torch.Tensor) -> torch.Tensor:
    """Return the terms of KL(a || b), [rows, events], from log a and log b; 0 where a is 0."""
    a = of_log.exp()
    return torch.where(a > 0, a * (of_log - other_log), torch.zeros_like(a))

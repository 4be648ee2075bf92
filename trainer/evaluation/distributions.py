"""Compare the teacher's and the student's probabilities at chosen tokens, for the doctor's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from harvester.system.token_bytes import token_bytes
from trainer.config import TrainConfig
from trainer.data.chat_template import Example, Renderer
from trainer.data.collator import batches
from trainer.data.tokens.stored_rows import Rendered
from trainer.model import model
from trainer.model.forward.rows import RowLayout
from trainer.model.forward.soft_loss import SoftMix, teacher_events
from trainer.training.forward import supervised_logits

# Answers that the student reads, evenly spread over the rows, and the tokens of each.
MOST_EXAMPLES = 24
MOST_TOKENS = 256
# Positions on the page: half of them where the two differ most, half evenly spread by difference.
MOST_POSITIONS = 12
# Listed tokens of a position on the page; the others are added to the tail.
MOST_LISTED = 8
# Tokens before a position that are shown.
CONTEXT_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Share:
    """Hold the probability, 0 to 1, that teacher and student give to a token."""

    text: str
    teacher: float
    student: float


@dataclass(frozen=True, slots=True)
class ComparedToken:
    """Hold both distributions at one token of an answer.

    Attributes:
        before: the text before it. target: the token of the answer.
        divergence: KL divergence over the listed tokens and the tail, in nats.
        shares: the likeliest of the listed tokens. tail: all other tokens.
    """

    prompt_id: str
    before: str
    target: str
    divergence: float
    shares: tuple[Share, ...]
    tail: Share


def compare(rendered: Rendered, renderer: Renderer, config: TrainConfig) -> tuple[ComparedToken, ...]:
    """Let the untrained student read some answers, and choose tokens at which to show both distributions.

    Raises:
        StudentError, ConfigError: the base can't be loaded, or its device is absent.
    """
    numbers = rendered.with_soft_targets
    if not len(numbers):
        return ()
    places = np.linspace(0, len(numbers) - 1, min(MOST_EXAMPLES, len(numbers))).round().astype(int)
    device = model.select_device(config.train)
    student = model.load_base_of(config, device)
    # A part of a character is shown by its bytes.
    names = [data.decode(errors="backslashreplace") for data in token_bytes(renderer.tokenizer)]
    compared = []
    for number in [int(numbers[place]) for place in places]:
        example = shortened(rendered.examples[number])
        prompt_id = rendered.prompt_id(number)
        compared += _compare_example(example, prompt_id, student, device, renderer, names)
    return _chosen(compared)


def shortened(example: Example) -> Example:
    """Cut an example after `MOST_TOKENS` supervised tokens."""
    soft = example.soft
    assert soft is not None
    kept = soft.positions < MOST_TOKENS
    return replace(
        example,
        ids=example.ids[: example.prompt_length + MOST_TOKENS],
        soft=replace(
            soft, positions=soft.positions[kept], ids=soft.ids[kept], log_probs=soft.log_probs[kept]
        ),
    )


@torch.no_grad()
def _compare_example(
    example: Example,
    prompt_id: str,
    student: Any,
    device: torch.device,
    renderer: Renderer,
    names: Sequence[str],
) -> list[ComparedToken]:
    soft = example.soft
    if soft is None or not len(soft.positions):
        return []
    [batch] = batches([example], device, RowLayout(packed=False))
    rows = torch.from_numpy(soft.positions).to(device, torch.int64)
    logits = supervised_logits(student, batch)[rows].float()
    ids = torch.from_numpy(soft.ids).to(device, torch.int64)
    listed = torch.from_numpy(soft.log_probs.astype(np.float32)).to(device)
    p = teacher_events(listed, SoftMix()).exp().cpu().double()
    q = (logits.gather(1, ids) - torch.logsumexp(logits, dim=-1, keepdim=True)).exp().cpu().double()
    q = torch.where(listed.cpu() > -torch.inf, q, 0.0)
    q = torch.cat([q, (1 - q.sum(dim=-1, keepdim=True)).clamp_min(1e-12)], dim=-1)
    terms = torch.where(p > 0, p * (p / q.clamp_min(1e-12)).clamp_min(1e-300).log(), 0.0)
    compared = []
    for row, position in enumerate(soft.positions.tolist()):
        at = example.prompt_length + position
        listed_here = int((soft.log_probs[row] > -np.inf).sum())
        shown = min(listed_here, MOST_LISTED)
        pairs = list(zip(p[row].tolist(), q[row].tolist(), strict=True))
        compared.append(
            ComparedToken(
                prompt_id,
                renderer.decode(example.ids[max(0, at - CONTEXT_TOKENS) : at].tolist()),
                names[example.ids[at]],
                float(terms[row].sum()),
                tuple(Share(names[soft.ids[row, place]], *pairs[place]) for place in range(shown)),
                Share("", *(sum(side) for side in zip(*pairs[shown:], strict=True))),
            )
        )
    return compared


def _chosen(compared: Sequence[ComparedToken]) -> tuple[ComparedToken, ...]:
    """Return the tokens with the largest divergence, then some evenly spread down to the smallest."""
    ordered = sorted(compared, key=lambda token: -token.divergence)
    largest, rest = ordered[: MOST_POSITIONS // 2], ordered[MOST_POSITIONS // 2 :]
    count = min(len(rest), MOST_POSITIONS - len(largest))
    places: list[int] = np.linspace(0, len(rest) - 1, count).round().astype(int).tolist() if count else []
    return (*largest, *(rest[place] for place in places))

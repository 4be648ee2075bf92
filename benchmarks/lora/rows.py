"""Make documents for `trainer_vs_trl`: the demo's rows on the tiny student, or random ids."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import TrainSection
from trainer.data.chat_template import Example, Renderer
from trainer.data.order import Order
from trainer.model import model

Step = list[list[tuple[list[int], int]]]


def skills(base: Path, prompts: Path) -> list[Example]:
    """The demo's training prompts with their references, rendered for the tiny student."""
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    renderer = Renderer(model.load_tokenizer(base))
    sent = [[{"role": "user", "content": line["prompt"]}] for line in lines]
    return renderer.examples(sent, [line["reference"] for line in lines], [True] * len(lines))


def drawn(tokens: int, *, mean: int, longest: int, vocabulary: int, seed: int = 0) -> list[Example]:
    """Random ids in documents of log-normal length, a quarter of each its prompt, `tokens` in all or a little
    more."""
    lengths, ids = random.Random(seed), np.random.default_rng(seed)
    made: list[Example] = []
    while tokens > 0:
        length = min(longest, max(8, round(lengths.lognormvariate(0.0, 0.6) * mean * 0.85)))
        made.append(Example(ids.integers(3, vocabulary, size=length, dtype=np.int32), length // 4))
        tokens -= length
    return made


def steps(examples: list[Example], count: int, *, pack_tokens: int, packs_per_step: int) -> list[Step]:
    """`count` full steps in the order our trainer gives them; epochs go on until there are enough."""
    facts: dict[str, Any] = {
        "batch_tokens": pack_tokens * packs_per_step,
        "pack_tokens": pack_tokens,
        "max_length": pack_tokens,
        "epochs": 1,
    }
    made: list[Step] = []
    for epoch in range(10**6):
        order = Order([len(e.ids) for e in examples], TrainSection(**facts, seed=epoch))
        for step in range(order.steps):
            packs = order.packs(step)
            if len(packs) < packs_per_step:
                continue  # TRL's accumulation is a constant
            made.append([[_document(examples[i]) for i in pack] for pack in packs])
            if len(made) == count:
                return made
    raise AssertionError


def _document(example: Example) -> tuple[list[int], int]:
    return example.ids.tolist(), example.prompt_length

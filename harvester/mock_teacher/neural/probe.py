"""Prove at load that padding does not change a model's answers, by the answers themselves.

A mask keeps attention from padding. It does not keep a recurrent state (Mamba, RWKV) or a convolution from
it, so the answers of such a model would depend on what else is in the batch.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from harvester.errors import ConfigError
from harvester.mock_teacher.neural.batch import Batch, GeneratedRow

PROMPT_TOKENS = (3, 17, 5)
ANSWER_TOKENS = 4
# Log-probabilities may differ by this share of the largest: rounding of float32 stays below a tenth of it.
TOLERANCE = 1e-3


def check_batches(model: Any, folder: Path) -> None:
    """Generate for three prompts together and alone, and compare log-probabilities.

    Raises:
        ConfigError: they differ, or the model can't be run with a cache of keys and values.
    """
    rng = random.Random(0)
    size = int(model.get_input_embeddings().num_embeddings)
    prompts = [[rng.randrange(size) for _ in range(count)] for count in PROMPT_TOKENS]
    try:
        together = _generate(model, prompts)
        alone = [row for prompt in prompts for row in _generate(model, [prompt])]
        first = [_first_values(model, prompt) for prompt in prompts]
    except Exception as error:
        raise ConfigError(
            f"the model can't generate with a cache of keys and values: {type(error).__name__}: {error}",
            place=str(folder),
            remedy="name a model whose layers are all attention",
        ) from error
    for batched, single, values in zip(together, alone, first, strict=True):
        if not (_agree(batched, single) and _are_close(single.top[0][1], values)):
            raise ConfigError(
                "the model's answers depend on the padding of its batch, as with recurrent layers",
                place=str(folder),
                remedy="name a model whose layers are all attention",
            )


def _generate(model: Any, prompts: list[list[int]]) -> list[GeneratedRow]:
    errors: list[Exception] = []
    rows = [
        GeneratedRow(
            prompt,
            temperature=0.0,
            top_p=1.0,
            seed=b"",
            wants_logprobs=True,
            is_done=lambda row: len(row.tokens) == ANSWER_TOKENS,
            done=lambda _: None,
            failed=errors.append,
        )
        for prompt in prompts
    ]
    batch = Batch(model)
    batch.join(rows)
    while len(batch):
        batch.step()
    return rows


def _first_values(model: Any, prompt: list[int]) -> list[float]:
    """Return the highest log-probabilities after a prompt by a plain forward pass: no cache, no mask."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1].float()
    values: list[float] = logits.log_softmax(dim=-1).topk(min(20, logits.size(0))).values.tolist()
    return values


def _agree(batched: GeneratedRow, single: GeneratedRow) -> bool:
    """Compare the values of each step, up to a step at which rounding has decided between two tokens."""
    for step in range(ANSWER_TOKENS):
        if not _are_close(batched.top[step][1], single.top[step][1]):
            return False
        if batched.tokens[step] != single.tokens[step]:
            break
    return True


def _are_close(values: list[float], others: list[float]) -> bool:
    largest = max(1.0, *map(abs, others))
    return all(abs(a - b) <= TOLERANCE * largest for a, b in zip(values, others, strict=True))

"""Read the prompts that a student answers, and choose those of a round. Loads no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from trainer.errors import DataError
from trainer.experiments.pool import PoolPrompt, in_order, is_to_learn, pool_prompt, prompt_lines
from trainer.onpolicy.config import OnPolicyFiles

# Separates the orders of successive passes over the prompts.
_PASSES = 1_000_003


def read_prompts(files: OnPolicyFiles) -> tuple[list[PoolPrompt], list[PoolPrompt]]:
    """Return the prompts to learn from, and at most `held_out_prompts` held-out ones, in a seeded order.

    A prompt that is held out by one line is not learned from another one with the same content.

    Raises:
        DataError: a file can't be read, a line is no prompt, or one of the two parts is empty.
    """
    learned: dict[str, PoolPrompt] = {}
    held_out: dict[str, PoolPrompt] = {}
    for path in files.prompts:
        for place, text, fields in prompt_lines(path):
            prompt = pool_prompt(text, fields, files.system, place)
            if prompt is None:
                continue
            part = learned if is_to_learn(prompt, files.train.data) else held_out
            part.setdefault(prompt.key, prompt)
    for what, part in (("to learn from", learned), ("held out", held_out)):
        if not part:
            raise DataError(
                f"no prompt is {what}",
                place=", ".join(map(str, files.prompts)),
                remedy=f"prompts with {files.train.data.split_field!r} = 'train' are learned from, others "
                "are held out; without that field [data] eval_share decides",
            )
    most = files.config.held_out_prompts
    left = [prompt for key, prompt in learned.items() if key not in held_out]
    seed = files.config.seed
    return in_order(left, (), seed), in_order(list(held_out.values()), (), seed)[:most]


def of_round(prompts: Sequence[PoolPrompt], number: int, count: int, seed: int) -> list[PoolPrompt]:
    """Return the prompts of a round, counted from 1. Each pass over all prompts has an order of its own."""
    chosen: list[PoolPrompt] = []
    start = (number - 1) * count
    for place in range(start, start + count):
        turn, at = divmod(place, len(prompts))
        if not chosen or at == 0:
            order = in_order(prompts, (), seed * _PASSES + turn)
        chosen.append(order[at])
    return chosen


def sample_seed(seed: int, number: int, key: str, sample: int) -> int:
    """Return the seed of one answer: a function of round, prompt and sample, whatever else is answered."""
    drawn = hashlib.sha256(f"{seed} {number} {key} {sample}".encode()).digest()
    return int.from_bytes(drawn[:8], "little") >> 1

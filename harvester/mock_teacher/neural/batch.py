"""Generate for many rows at once with a KV cache; rows join and leave between two tokens.

Rows of different length are padded on the left and masked, with positions of their own, so a row's result
does not depend on the others beyond rounding.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from harvester.mock_teacher.neural.cache import RowCache
from harvester.mock_teacher.neural.sampling import choose

MAX_TOP = 20
# What a forward pass costs beyond its tokens, in tokens of a small model.
CALL_TOKENS = 120


@dataclass(slots=True)
class GeneratedRow:
    """One row: its prompt, how it is sampled, and the tokens chosen so far.

    `logprobs` are the model's own (temperature 1, before top_p); `top` holds ids and values, likeliest first.
    `is_done` gets the row after each token and ends it.
    """

    prompt: Sequence[int]
    temperature: float
    top_p: float
    seed: bytes
    wants_logprobs: bool
    is_done: Callable[[GeneratedRow], bool]
    done: Callable[[GeneratedRow], None]
    failed: Callable[[Exception], None]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[list[int], list[float]]] = field(default_factory=list)


class Batch:
    """The rows in work."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rows: list[GeneratedRow] = []
        self._draws: list[random.Random] = []
        self._cache = RowCache()
        self._last: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def join(self, rows: Sequence[GeneratedRow]) -> None:
        """Read the prompts of new rows, equal ones once, and choose their first tokens."""
        by_prompt: dict[tuple[int, ...], list[GeneratedRow]] = defaultdict(list)
        for row in rows:
            by_prompt[tuple(row.prompt)].append(row)
        prompts = sorted(by_prompt, key=len)
        at = 0
        for size in group_sizes([len(prompt) for prompt in prompts]):
            self._read(prompts[at : at + size], [by_prompt[prompt] for prompt in prompts[at : at + size]])
            at += size
        self._leave()

    def _read(self, prompts: Sequence[Sequence[int]], owners: Sequence[Sequence[GeneratedRow]]) -> None:
        """Read prompts in one forward pass, and append the rows of each."""
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, prompt in enumerate(prompts):
            ids[at, width - len(prompt) :] = torch.tensor(prompt)
            mask[at, width - len(prompt) :] = 1
        logits, cache = self._forward(ids, mask, (mask.cumsum(dim=1) - 1).clamp_min(0), DynamicCache())
        sources = [at for at, sharing in enumerate(owners) for _ in sharing]
        rows = [row for sharing in owners for row in sharing]
        draws = [random.Random(row.seed) for row in rows]
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._cache.add(layers, sources, [len(prompts[at]) for at in sources])
        self._last += _append(rows, draws, logits[sources])
        self.rows += rows
        self._draws += draws

    @torch.inference_mode()
    def step(self) -> None:
        """Choose one more token for every row."""
        cache, mask, positions = self._cache.extend()
        logits, _ = self._forward(torch.tensor(self._last)[:, None], mask, positions, cache)
        self._last = _append(self.rows, self._draws, logits)
        self._leave()

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, Any]:
        """Return the logits of each row's last token, (rows, vocabulary) in float32, and the filled cache."""
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1].float(), out.past_key_values

    def _leave(self) -> None:
        """Take finished rows out."""
        kept = []
        for at, row in enumerate(self.rows):
            if row.is_done(row):
                row.done(row)
            else:
                kept.append(at)
        if len(kept) < len(self.rows):
            order = self._cache.keep(kept)
            self.rows = [self.rows[at] for at in order]
            self._draws = [self._draws[at] for at in order]
            self._last = [self._last[at] for at in order]


def _append(rows: Sequence[GeneratedRow], draws: Sequence[random.Random], logits: torch.Tensor) -> list[int]:
    """Choose the next token of each row, append it to the row, and return all."""
    chosen = choose(
        logits,
        [row.temperature for row in rows],
        [row.top_p for row in rows],
        [draw.random() for draw in draws],
    )
    ids: list[int] = chosen.tolist()
    if any(row.wants_logprobs for row in rows):
        every = logits.log_softmax(dim=-1)
        own = every.gather(1, chosen[:, None]).squeeze(1).tolist()
        values, order = every.topk(min(MAX_TOP, every.size(1)), dim=-1)
        for row, value, top_ids, top_values in zip(rows, own, order.tolist(), values.tolist(), strict=True):
            if row.wants_logprobs:
                row.logprobs.append(value)
                row.top.append((top_ids, top_values))
    for row, token in zip(rows, ids, strict=True):
        row.tokens.append(token)
    return ids


def group_sizes(lengths: Sequence[int]) -> list[int]:
    """Split ascending lengths into runs that are read together; return the size of each run.

    A run is padded to its longest, and costs `CALL_TOKENS` besides: the sum over runs is the least possible.
    """
    best = [(0, 0)]  # for each number of leading lengths: the least cost, and the size of the last run
    for end in range(1, len(lengths) + 1):
        best.append(
            min(
                (best[end - size][0] + size * lengths[end - 1] + CALL_TOKENS, size)
                for size in range(1, end + 1)
            )
        )
    sizes = []
    end = len(lengths)
    while end:
        sizes.append(best[end][1])
        end -= best[end][1]
    return sizes[::-1]

"""Generate for many rows at once with a KV cache; rows join and leave between two tokens.

Rows of different length are padded on the left and masked, with positions of their own, so a row's result
does not depend on the others beyond rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from harvester.mock_teacher.neural.sampling import choose

MAX_TOP = 20


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
    """The rows in work, and their keys and values: tensors (rows, heads, width, size), one pair a layer."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.rows: list[GeneratedRow] = []
        self._draws: list[random.Random] = []
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._mask = torch.zeros(0, 0, dtype=torch.long)
        self._last = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def join(self, rows: Sequence[GeneratedRow]) -> None:
        """Read the prompts of new rows and choose their first tokens."""
        width = max(len(row.prompt) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[at, width - len(row.prompt) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        logits, cache = self._forward(ids, mask, positions, DynamicCache())
        draws = [random.Random(row.seed) for row in rows]
        last = self._append(rows, draws, logits)
        if self.rows:
            wide = max(width, self._mask.size(1))
            mask = torch.cat([_wider(self._mask, wide, 1), _wider(mask, wide, 1)])
            cache = [
                (
                    torch.cat([_wider(a, wide, 2), _wider(c, wide, 2)]),
                    torch.cat([_wider(b, wide, 2), _wider(d, wide, 2)]),
                )
                for (a, b), (c, d) in zip(self._cache, cache, strict=True)
            ]
        self.rows += rows
        self._draws += draws
        self._cache, self._mask, self._last = cache, mask, torch.cat([self._last, last])
        self._leave()

    @torch.inference_mode()
    def step(self) -> None:
        """Choose one more token for every row."""
        self._mask = torch.cat([self._mask, torch.ones(len(self.rows), 1, dtype=torch.long)], dim=1)
        positions = self._mask.sum(dim=1, keepdim=True) - 1
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._cache):
            cache.update(keys, values, layer)
        logits, self._cache = self._forward(self._last[:, None], self._mask, positions, cache)
        self._last = self._append(self.rows, self._draws, logits)
        self._leave()

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        out = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return out.logits[:, -1].float(), layers

    def _append(
        self, rows: Sequence[GeneratedRow], draws: Sequence[random.Random], logits: torch.Tensor
    ) -> torch.Tensor:
        chosen = choose(
            logits,
            [row.temperature for row in rows],
            [row.top_p for row in rows],
            [draw.random() for draw in draws],
        )
        ids = chosen.tolist()
        if any(row.wants_logprobs for row in rows):
            every = logits.log_softmax(dim=-1)
            own = every.gather(1, chosen[:, None]).squeeze(1).tolist()
            values, order = every.topk(min(MAX_TOP, every.size(1)), dim=-1)
            for row, value, top_ids, top_values in zip(
                rows, own, order.tolist(), values.tolist(), strict=True
            ):
                if row.wants_logprobs:
                    row.logprobs.append(value)
                    row.top.append((top_ids, top_values))
        for row, token in zip(rows, ids, strict=True):
            row.tokens.append(token)
        return chosen

    def _leave(self) -> None:
        """Take finished rows out, and columns that no row uses any more."""
        finished = [row.is_done(row) for row in self.rows]
        if not any(finished):
            return
        for row, is_finished in zip(self.rows, finished, strict=True):
            if is_finished:
                row.done(row)
        kept = [at for at, is_finished in enumerate(finished) if not is_finished]
        self.rows = [self.rows[at] for at in kept]
        self._draws = [self._draws[at] for at in kept]
        index = torch.tensor(kept, dtype=torch.long)
        self._mask, self._last = self._mask[index], self._last[index]
        width = int(self._mask.sum(dim=1).max()) if kept else 0
        start = self._mask.size(1) - width
        self._mask = self._mask[:, start:]
        self._cache = [(keys[index, :, start:], values[index, :, start:]) for keys, values in self._cache]


def _wider(tensor: torch.Tensor, width: int, dimension: int) -> torch.Tensor:
    """Pad with zeros on the left of a dimension up to `width`."""
    shape = list(tensor.shape)
    shape[dimension] = width - shape[dimension]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dimension)

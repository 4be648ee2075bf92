"""Hold the cache of answers that are generated together, and cut it row by row (continuous batching).

A batch of `transformers.generate` lasts as long as its longest answer, and computes a row for each answer
that has ended long before. Here rows leave the cache when their answers end, and further prompts take their
places. All rows end in the same column of the cache, so a row's tokens are as far apart as they are alone;
columns before its first token are masked. Attention, windows and positions therefore see what they see in a
batch of `generate`. transformers has continuous batching of its own (`generate_batch`), with a thread,
another attention that would have to be proved anew, and caches for full and sliding attention only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from trainer.model import rotary
from trainer.model.structure import base_model_of, text_config

# Layers of caches that can be cut by rows. Subclasses hold more than these do. A layer that reuses another
# one's keys, or has none, holds nothing; older versions of transformers have no class for it.
_CUT_BY_ROWS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
}
# Rotary embeddings whose angles depend on the longest row of the batch.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def why_not(model: Any) -> str:
    """Return why a model's cache can't be cut row by row; empty if it can."""
    base = base_model_of(model)
    config = text_config(base)
    if getattr(base.config, "is_encoder_decoder", False):
        return "it has an encoder"
    try:
        cache = DynamicCache(config=config)
    except Exception as error:  # noqa: BLE001 - of its configuration
        return f"transformers has no cache for it ({type(error).__name__})"
    kinds = {type(layer).__name__ for layer in cache.layers}
    if not kinds or (others := sorted(kinds - _CUT_BY_ROWS)):
        return f"its cache has layers of another kind: {', '.join(others) if kinds else 'none'}"
    if kinds <= {"LinearAttentionLayer", "DummyLayer"}:
        return "its cache doesn't know how long it is"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()) or getattr(
        config, "attention_chunk_size", None
    ):
        return "its attention is in chunks, whose bounds depend on the column"
    if rotary.kinds_of(getattr(config, "rope_parameters", None)) & _LENGTH_DEPENDENT_ROPE:
        return "its rotary embedding depends on the longest row of the batch"
    return ""


def padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [prompts, longest] padded on the left, and the mask that hides the padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


class ContinuousBatch:
    """Computes the next logits of rows that may leave and join between two tokens.

    Args:
        model: a causal language model for which `why_not` is empty, or a PEFT model around one, in evaluation
            mode.
        pad_id: token that fills the columns before a row's first token.

    Attributes:
        device: where the model's input embedding is.
    """

    def __init__(self, model: Any, pad_id: int) -> None:
        self._base = base_model_of(model)
        self._pad_id = pad_id
        self.device = self._base.get_input_embeddings().weight.device
        accepted = inspect.signature(self._base.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache: Any = None
        # [rows, columns]: 1 where a row has a token. Tokens before the next one, [rows, 1].
        self._mask = torch.zeros((0, 0), dtype=torch.int64, device=self.device)
        self._lengths = torch.zeros((0, 1), dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._mask)

    def admit(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append a row for each prompt; return the logits [prompts, vocabulary] of their next tokens."""
        ids, mask = padded(prompts, self._pad_id)
        mask = mask.to(self.device)
        lengths = mask.sum(1, keepdim=True)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
        cache = DynamicCache(config=text_config(self._base))
        logits = self._forward(ids.to(self.device), mask, positions, cache)
        if len(self):
            columns = max(mask.shape[1], self._mask.shape[1])
            for own, new in zip(self._cache.layers, cache.layers, strict=True):
                _append_rows(own, new, columns)
            mask = torch.cat([_widened(self._mask, columns, 1), _widened(mask, columns, 1)])
            lengths = torch.cat([self._lengths, lengths])
        else:
            self._cache = cache
        self._mask, self._lengths = mask, lengths
        return logits

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each row; return the logits [rows, vocabulary] of the next ones.

        Args:
            tokens: [rows] ids, on the model's device.
        """
        self._mask = torch.cat([self._mask, self._mask.new_ones((len(self), 1))], dim=1)
        logits = self._forward(tokens[:, None], self._mask, self._lengths, self._cache)
        self._lengths = self._lengths + 1
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows leave, and the columns that only they had tokens in."""
        if not rows:
            self.clear()
            return
        index = torch.tensor(rows, device=self.device)
        self._mask, self._lengths = self._mask[index], self._lengths[index]
        cut = self._mask.shape[1] - int(self._lengths.max())
        self._mask = self._mask[:, cut:]
        for layer in self._cache.layers:
            _keep_rows(layer, index, cut)

    def clear(self) -> None:
        """Let all rows leave."""
        self._cache = None
        self._mask, self._lengths = self._mask[:0, :0], self._lengths[:0]

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        options = {**self._options, "position_ids": positions} if self._takes_positions else self._options
        output = self._base(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options
        )
        # A copy, so that the logits of a prompt's other tokens are not held.
        logits: torch.Tensor = output.logits[:, -1].clone()
        return logits


def _widened(tensor: torch.Tensor, columns: int, axis: int) -> torch.Tensor:
    """Return a tensor with zeros before its columns."""
    shape = list(tensor.shape)
    shape[axis] = columns - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis) if shape[axis] else tensor


def _append_rows(layer: Any, new: Any, columns: int) -> None:
    """Append the rows of a new layer; both get zeros before their columns, up to `columns`."""
    if isinstance(layer, LinearAttentionLayer):
        for states, added in (
            (layer.conv_states, new.conv_states),
            (layer.recurrent_states, new.recurrent_states),
        ):
            for name, state in states.items():
                states[name] = None if state is None else torch.cat([state, added[name]])
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        held = columns
        if isinstance(layer, DynamicSlidingWindowLayer):
            held = min(columns, layer.sliding_window - 1)
            layer.cumulative_length = columns
        layer.keys = torch.cat([_widened(layer.keys, held, 2), _widened(new.keys, held, 2)])
        layer.values = torch.cat([_widened(layer.values, held, 2), _widened(new.values, held, 2)])


def _keep_rows(layer: Any, index: torch.Tensor, cut: int) -> None:
    """Keep the rows at `index` alone, without their first `cut` columns."""
    if isinstance(layer, LinearAttentionLayer):
        for states in (layer.conv_states, layer.recurrent_states):
            for name, state in states.items():
                states[name] = None if state is None else state[index]
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        held = layer.get_seq_length() - cut
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = held
            held = min(held, layer.sliding_window - 1)
        first = layer.keys.shape[2] - held
        layer.keys = layer.keys[:, :, first:][index]
        layer.values = layer.values[:, :, first:][index]

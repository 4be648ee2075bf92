"""Compute attention on CUDA over packed rows with torch's variable-length kernel: no padding, no mask.

torch 2.11's kernel takes `window_size`, 2.13's also `enable_gqa`, so its parameters are inspected. It needs
16-bit values, heads of at most 256 values and a multiple of 8, a GPU of compute capability 8.0 or newer, and
has no dropout. `can_run` checks that; elsewhere `segment_attention` runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface

from trainer.model.forward import hopper_attention
from trainer.model.forward.segment_attention import refuse_unknown

ATTENTION_NAME = "distil_varlen"

# FlashAttention's limits, which torch's kernel has too.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True, slots=True)
class DocumentBounds:
    """Token positions where the documents of a row begin.

    Attributes:
        starts: [documents + 1] int32, from 0 to the row's tokens.
        longest: tokens of the longest document.
    """

    starts: torch.Tensor
    longest: int


def document_bounds(lengths: Sequence[int], device: torch.device | str) -> DocumentBounds:
    """Return the bounds of consecutive documents.

    Args:
        lengths: tokens of each document.
    """
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=starts[1:])
    if torch.device(device).type == "cuda":
        starts = starts.pin_memory()  # else the copy would make the host wait
    return DocumentBounds(starts.to(device, non_blocking=True), max(lengths))


def can_run(config: Any, device: torch.device) -> bool:
    """Return whether the kernel can compute the attention of a model on a device.

    Args:
        config: the model's text configuration.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        return False
    size = _head_size(config)
    return size is None or (size % 8 == 0 and size <= MAX_HEAD_SIZE)


def _head_size(config: Any) -> int | None:
    """Return the values of a head; None where a configuration doesn't say."""
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    return size if isinstance(size, int) else None


def prepare(config: Any, device: torch.device) -> None:
    """Use FlashAttention 3 for a model that `can_run`, where it is installed; see `hopper_attention`."""
    size = _head_size(config)
    if size is not None:
        hopper_attention.activate(device, _kernel(), size)


# Bounds differ with every pack: traced, attention would be compiled anew for each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(  # noqa: PLR0913 - the signature is transformers'
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: DocumentBounds | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; shapes as in `segment_attention.attend`.

    Raises:
        StudentError: the model asks for something this kernel would silently leave out.
    """
    refuse_unknown(module, attention_mask, segments, {**extra, "dropout": dropout or None})
    assert segments is not None  # `refuse_unknown` has seen to it
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
    dtype = q.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(
        q.device.type
    ):  # rotated in fp32; it takes 16 bits
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    kernel = _kernel()
    takes = _takes(kernel)
    options: dict[str, Any] = {"scale": scaling} if scaling is not None else {}
    window = extra.get("sliding_window")
    options["window_size"] = (int(window) - 1 if window else -1, 0)  # 0 to the right: causal
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    at, longest = segments.starts, segments.longest
    out = kernel(q, k, v, at, at, longest, longest, **options)
    return out.to(dtype)[None], None


@lru_cache(maxsize=8)
def _takes(kernel: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def _kernel() -> Any:
    from torch.nn.attention.varlen import varlen_attn  # loads CUDA's operators; absent on some builds

    return varlen_attn


def register() -> str:
    """Register `attend` with transformers, without a mask function; return its name."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    return ATTENTION_NAME

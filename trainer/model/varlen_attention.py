"""Compute attention on CUDA over packed rows with torch's variable-length kernel: no padding, no mask.

The kernel's signature moved between torch 2.11 (`is_causal`) and 2.13 (`window_size`, `enable_gqa`), so its
parameters are inspected.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface

from trainer.errors import StudentError
from trainer.model.segment_attention import refuse_unknown

ATTENTION_NAME = "distil_varlen"


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
    return DocumentBounds(starts.to(device, non_blocking=True), max(lengths))


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
    kernel = _kernel()
    takes = _takes(kernel)
    options: dict[str, Any] = {"scale": scaling} if scaling is not None else {}
    window = extra.get("sliding_window")
    if "window_size" in takes:
        options["window_size"] = (int(window) - 1 if window else -1, 0)
    elif window and segments.longest > window:
        raise StudentError("this torch has no sliding window for packed attention", remedy="torch >= 2.13")
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    at, longest = segments.starts, segments.longest
    out = kernel(q, k, v, at, at, longest, longest, **options)
    return out[None], None


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

"""Let torch's attention run FlashAttention 3 on a Hopper GPU, where that is installed and computes the same.

torch's own kernel is FlashAttention 2. FlashAttention 3 (arXiv 2407.08608) is a package of its own,
`flash_attn_interface`, that torch puts in its place on request. It is compared with torch's own kernel on the
device first, values and gradients, and put aside if it fails or differs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

PACKAGE, NAME = "flash_attn_interface", "FA3"
HOPPER = 9
# Largest difference between two kernels that round to bf16, as a share of the norm.
_TOLERANCE = 2**-6
_DOCUMENTS = (70, 33, 5, 1)


@lru_cache(maxsize=8)
def activate(device: torch.device, kernel: Callable[..., Any], head_size: int) -> bool:
    """Put FlashAttention 3 in the place of torch's kernel, for this process.

    Args:
        kernel: `torch.nn.attention.varlen.varlen_attn`, which calls what is active.
        head_size: values of a head.

    Returns:
        Whether it is active. Never with `[train] deterministic`.
    """
    from torch.nn import attention

    if torch.are_deterministic_algorithms_enabled() or importlib.util.find_spec(PACKAGE) is None:
        return False
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return False
    if NAME not in getattr(attention, "list_flash_attention_impls", tuple)():
        return False
    try:
        wanted = _values(kernel, device, head_size)
        attention.activate_flash_attention_impl(NAME)
        found = _values(kernel, device, head_size)
        is_alike = all(
            a.shape == b.shape and bool((a - b).norm() <= _TOLERANCE * b.norm())
            for a, b in zip(found, wanted, strict=True)
        )
    except Exception:  # noqa: BLE001 - a package for another torch, driver or device raises its own kinds
        is_alike = False
    if not is_alike:
        attention.restore_flash_attention_impl()
    return is_alike


def deactivate() -> None:
    """Put torch's own kernel back."""
    if is_active():
        from torch.nn import attention

        attention.restore_flash_attention_impl()
    activate.cache_clear()


def is_active() -> bool:
    """Return whether FlashAttention 3 is in the place of torch's kernel."""
    from torch.nn import attention

    return bool(getattr(attention, "current_flash_attention_impl", lambda: None)() == NAME)


def _values(kernel: Callable[..., Any], device: torch.device, head_size: int) -> list[torch.Tensor]:
    """Return what causal attention over packed documents gives, and the gradients of its inputs, in fp32."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(_DOCUMENTS)
    q, k, v, given = (
        torch.randn(tokens, 4, head_size, generator=draw).to(device, torch.bfloat16) for _ in range(4)
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    starts = torch.tensor([0, *_DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    with torch.enable_grad():
        out = kernel(*inputs, starts, starts, max(_DOCUMENTS), max(_DOCUMENTS), window_size=(-1, 0))
        gradients = torch.autograd.grad(out, inputs, given)
    return [tensor.detach().float() for tensor in (out, *gradients)]

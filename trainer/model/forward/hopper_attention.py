"""Let torch's attention run FlashAttention 3 on a Hopper GPU, where that is installed and computes the same.

torch's own kernel is FlashAttention 2. FlashAttention 3 (arXiv 2407.08608) is a package of its own,
`flash_attn_interface`, that torch puts in its place on request. It is compared with torch's own kernel on the
device first, values and gradients, and put aside if it fails or differs.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

PACKAGE, NAME = "flash_attn_interface", "FA3"
HOPPER = 9
# Largest difference between two kernels that round to bf16, as a share of the norm.
_TOLERANCE = 2**-6
# Documents longer and shorter than the rows that a kernel computes together.
_DOCUMENTS = (700, 300, 129, 5, 1)
# Heads of queries, and of keys and values: each for itself, and grouped.
_HEADS = ((4, 4), (8, 2))
# Tokens that a token sees before itself; -1 for all.
_WINDOWS = (-1, 100)


# Set once the kernel has failed or differed in this process.
_is_refused = threading.Event()


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
    if _is_refused.is_set():  # one process has one kernel: what failed for one head size is used for none
        return False
    try:
        if is_active():  # for another head size; it is not to be compared with itself
            attention.restore_flash_attention_impl()
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
        _is_refused.set()
        attention.restore_flash_attention_impl()
    return is_alike


def deactivate() -> None:
    """Put torch's own kernel back."""
    if is_active():
        from torch.nn import attention

        attention.restore_flash_attention_impl()
    activate.cache_clear()
    _is_refused.clear()


def is_active() -> bool:
    """Return whether FlashAttention 3 is in the place of torch's kernel."""
    from torch.nn import attention

    return bool(getattr(attention, "current_flash_attention_impl", lambda: None)() == NAME)


def _values(kernel: Callable[..., Any], device: torch.device, head_size: int) -> list[torch.Tensor]:
    """Return what causal attention over packed documents gives, and the gradients of its inputs, in fp32."""
    draw = torch.Generator().manual_seed(0)
    tokens = sum(_DOCUMENTS)
    starts = torch.tensor([0, *_DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    values: list[torch.Tensor] = []
    for (queries, keys), window in itertools.product(_HEADS, _WINDOWS):
        q, k, v, given = (
            torch.randn(tokens, heads, head_size, generator=draw).to(device, torch.bfloat16)
            for heads in (queries, keys, keys, queries)
        )
        inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
        options: dict[str, Any] = {"window_size": (window, 0)}
        given_heads = inputs
        if queries != keys and "enable_gqa" in inspect.signature(kernel).parameters:
            options["enable_gqa"] = True
        elif queries != keys:
            given_heads = [inputs[0], *(x.repeat_interleave(queries // keys, dim=1) for x in inputs[1:])]
        with torch.enable_grad():
            out = kernel(*given_heads, starts, starts, max(_DOCUMENTS), max(_DOCUMENTS), **options)
            gradients = torch.autograd.grad(out, inputs, given)
        values += [tensor.detach().float() for tensor in (out, *gradients)]
    return values

"""Compute RMS norms by torch's fused kernel on CUDA, where it gives what a model's own code gives.

transformers writes an RMS norm (Zhang and Sennrich 2019) as eight operations, and autograd as some fifteen
more: of the 4,231 kernel launches that a pack of a Qwen2.5-0.5B shape takes, norms are about a quarter.
`torch.nn.functional.rms_norm` is one launch each way on CUDA; elsewhere it is composed of such operations.
Compiled layers are fused by the compiler, and keep their own code.

Models differ in what they call an RMS norm: Gemma multiplies by 1 + weight. So each norm is compared with its
own code in fp32, values and gradients, on the device that trains, and stays as it is if they differ.
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

_EPSILON_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
# Largest difference from the own code in fp32, as a share of the largest value: a few roundings to bf16.
_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-18}
_ROWS = 5


def fuse_norms(student: torch.nn.Module) -> int:
    """Replace the forward of every frozen RMS norm that the fused kernel computes alike, in place.

    Returns:
        The number of norms that were changed.
    """
    count = 0
    for module in student.modules():
        epsilon = _epsilon_of(module)
        if epsilon is not None and _is_alike(module, epsilon):
            module.forward = MethodType(_fused_forward(epsilon), module)
            count += 1
    return count


def _fused_forward(epsilon: float) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if hidden_states.dtype != weight.dtype:  # as the product of both would be
            wide = torch.promote_types(hidden_states.dtype, weight.dtype)
            hidden_states, weight = hidden_states.to(wide), weight.to(wide)
        return functional.rms_norm(hidden_states, tuple(weight.shape), weight, epsilon)

    return forward


def _epsilon_of(module: torch.nn.Module) -> float | None:
    """Return the epsilon of an RMS norm whose only parameter is a frozen vector; None for other modules."""
    if "RMSNorm" not in type(module).__name__:
        return None
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if len(parameters) != 1 or weight is None or weight.ndim != 1 or weight.requires_grad:
        return None
    if list(inspect.signature(module.forward).parameters) not in (["hidden_states"], ["x"], ["hidden"]):
        return None
    values = [getattr(module, name) for name in _EPSILON_NAMES if hasattr(module, name)]
    return float(values[0]) if len(values) == 1 and isinstance(values[0], float) else None


def _is_alike(module: Any, epsilon: float) -> bool:
    """Return whether the fused kernel gives the values and gradients of the module's own code."""
    weight = module.weight
    tolerance = _TOLERANCE.get(weight.dtype)
    if tolerance is None:
        return False
    draw = torch.Generator().manual_seed(0)
    value, given = (torch.randn(_ROWS, len(weight), generator=draw) for _ in range(2))
    kind, device = weight.dtype, weight.device
    found = _values(_fused_forward(epsilon).__get__(module), value.to(device, kind), given.to(device, kind))
    with torch.autocast(device.type, enabled=False):
        own = torch.func.functional_call  # the same code with the weight in fp32
        wanted = _values(
            lambda x: own(module, {"weight": weight.detach().float()}, (x,)),
            value.to(device, kind).float(),
            given.to(device, kind).float(),
        )
    return all(
        a.shape == b.shape and bool((a.float() - b).abs().max() <= tolerance * b.abs().max())
        for a, b in zip(found, wanted, strict=True)
    )


def _values(norm: Any, value: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a norm gives, and the gradient of its input."""
    with torch.enable_grad():
        value = value.detach().requires_grad_()
        result = norm(value)
        [gradient] = torch.autograd.grad(result, value, given.to(result.dtype))
    return result.detach(), gradient

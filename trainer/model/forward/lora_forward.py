"""Choose the cheapest forward for each LoRA layer: folded, fused, or PEFT's own.

Folded: y = x (W + scale B A)^T, one matrix product with a temporary weight. It is the same function as
PEFT's x W^T + scale (x A^T) B^T when dropout is 0. It costs the gradient of the weight (2 in*out FLOP a
token) and saves the narrow products (6 r (in+out) FLOP) and one pass over [tokens, out]. On the CPU that
pays while `in` is small.

Fused: `lora_linear`. Used wherever folding does not pay, without dropout and DoRA. It also takes a base in 4
bits, which is never folded: each layer computes its own weight in the forward and again in the backward pass.

CPU ms of forward and backward of 1,024 tokens on one core, PEFT / folded / fused:
128x256 rank 32: 3.4 / 2.5 / 3.3; 512x512 rank 16: 15.8 / 18.7 / 14.3.

The parameters are PEFT's own, so the adapter's files are too.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch.nn import functional

from trainer.model.forward.lora_kernel import lora_linear
from trainer.model.four_bit import FourBitLinear

# Cost of the pass over the output that folding saves, on the CPU, as FLOP per output element. Memory traffic
# dominates that pass; 150 FLOP take the measured time.
OUTPUT_PASS_FLOP = 150

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def replace_lora_forward(student: torch.nn.Module, adapter: str = "default", *, sharded: bool = False) -> int:
    """Override the forward of every plain LoRA layer with a cheaper one, in place.

    Layers with dropout, DoRA, a bias in B or a transposed weight keep PEFT's forward.

    Args:
        adapter: PEFT's name of the adapter.
        sharded: whether the base is split by FSDP. Then a weight exists only during its layer's forward and
            backward, so no folded copy of it may be kept for the backward pass.

    Returns:
        The number of layers that were changed.
    """
    count = 0
    for module in student.modules():
        if isinstance(module, Linear) and _is_plain(module, adapter):
            folds = not sharded and _folding_is_cheaper(module, adapter)
            forward = _folded_forward(adapter) if folds else _fused_forward(adapter)
            module.forward = MethodType(forward, module)
            count += 1
    return count


def slow_layers(student: torch.nn.Module, adapter: str = "default") -> tuple[int, int]:
    """Count the layers that keep PEFT's forward, and all layers with an adapter."""
    layers = [m for m in student.modules() if isinstance(m, LoraLayer) and adapter in m.r]
    return sum(not isinstance(m, Linear) or not _is_plain(m, adapter) for m in layers), len(layers)


def _is_plain(layer: Any, adapter: str) -> bool:
    has_no_dropout = isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
    is_linear = type(layer.base_layer) in (torch.nn.Linear, FourBitLinear)
    is_plain_linear = is_linear and layer.lora_B[adapter].bias is None
    is_variant = layer.use_dora.get(adapter) or layer.fan_in_fan_out
    return bool(has_no_dropout and is_plain_linear and not is_variant)


def _folding_is_cheaper(layer: Any, adapter: str) -> bool:
    if isinstance(layer.base_layer, FourBitLinear):
        return False
    weight = layer.base_layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False  # rounding W + scale B A to bf16 would lose most of the adapter
    out_features, in_features = weight.shape
    rank = layer.r[adapter]
    cost = 2 * in_features * out_features
    saving = 6 * rank * (in_features + out_features) + OUTPUT_PASS_FLOP * out_features
    return bool(cost < saving)


def _folded_forward(adapter: str) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        lora_a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        weight = torch.addmm(self.base_layer.weight, lora_b, lora_a, alpha=self.scaling[adapter])
        return functional.linear(x, weight, self.base_layer.bias)

    return forward


def _fused_forward(adapter: str) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        lora_a, lora_b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        weight = base.dequantised if isinstance(base, FourBitLinear) else base.weight
        return lora_linear(x, weight, base.bias, lora_a, lora_b, self.scaling[adapter])

    return forward

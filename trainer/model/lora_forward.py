"""The cheaper forward of a LoRA layer: folded into one weight, fused into one function, or PEFT's own.

Folded: y = x (W + s B A)^T is the same function as PEFT's x W^T + s (x A^T) B^T when dropout is 0. It pays
the weight's gradient (2 in*out FLOP a token) and saves the skinny products (6 r (in+out)) and a walk over
[tokens, out]; on CPU that pays while `in` is small (CPU ms of forward and backward of 1,024 tokens, one core,
PEFT / folded / fused: 128x256 rank 32 3.4 / 2.5 / 3.3; 512x512 rank 16 15.8 / 18.7 / 14.3). Everywhere else
without dropout and DoRA: `fused`. Parameters stay PEFT's own, so the adapter's files do too.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn import functional

from trainer.model.lora_kernel import lora_linear

OUTPUT_PASS_FLOP = 150  # arithmetic that fits the time of the saved walk, per output element, on CPU


def replace_lora_forward(model: torch.nn.Module, adapter: str = "default", *, sharded: bool = False) -> int:
    """Swap the forward of every plain LoRA layer for a cheaper one; returns how many.

    Layers with dropout or DoRA keep PEFT's forward.

    Args:
        sharded: the base's weights are gathered for a moment only: none may be kept folded for backward.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, Linear) and _is_plain(module, adapter):
            folds = not sharded and _pays(module, adapter)
            module.forward = MethodType(_folded(adapter) if folds else _fused(adapter), module)
            count += 1
    return count


def _is_plain(layer: Any, adapter: str) -> bool:
    no_dropout = isinstance(layer.lora_dropout[adapter], torch.nn.Identity)
    whole = type(layer.base_layer) is torch.nn.Linear and layer.lora_B[adapter].bias is None
    return bool(no_dropout and whole and not layer.use_dora.get(adapter) and not layer.fan_in_fan_out)


def _pays(layer: Any, adapter: str) -> bool:
    weight = layer.base_layer.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False  # a folded bf16 weight would round the adapter away
    out, inner = weight.shape
    rank = layer.r[adapter]
    return bool(2 * inner * out < 6 * rank * (inner + out) + OUTPUT_PASS_FLOP * out)


def _folded(adapter: str) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up, down = self.lora_B[adapter].weight, self.lora_A[adapter].weight
        weight = torch.addmm(self.base_layer.weight, up, down, alpha=self.scaling[adapter])
        return functional.linear(x, weight, self.base_layer.bias)

    return forward


def _fused(adapter: str) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up, down, base = self.lora_B[adapter].weight, self.lora_A[adapter].weight, self.base_layer
        return lora_linear(x, base.weight, base.bias, down, up, self.scaling[adapter])

    return forward

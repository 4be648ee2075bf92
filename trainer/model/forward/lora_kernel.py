"""Compute a LoRA layer as one autograd function, with its gradients written by hand.

Notation of the LoRA paper (Hu et al. 2021, arXiv 2106.09685): y = x W^T + b + scale (x A^T) B^T, where W is
frozen, A is [rank, in] and B is [out, rank].

PEFT's forward converts a bf16 input to the adapter's fp32, multiplies in fp32, and adds three tensors of
[tokens, out]. Here A and B are rounded to the base's dtype for the call only, their product is added inside
the matrix multiplication (`addmm`), and the gradients of A and B are summed in fp32. The gradient of W is
never computed. The parameters are PEFT's own, so the adapter's files are too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

# A frozen weight [out, in], or what computes it: a weight in 4 bits exists in full only while it is used.
Weight = torch.Tensor | Callable[[], torch.Tensor]


def lora_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Compute y = x W^T + b + scale (x A^T) B^T, without dropout.

    Args:
        x: [..., in], any float dtype.
        weight: W, [out, in], frozen, in x's dtype. A function is called in the forward and again in the
            backward pass, and what it returns is not kept.
        bias: b, [out], frozen, in x's dtype, or None.
        lora_a: A, [rank, in]; may be wider than x (fp32 over bf16).
        lora_b: B, [out, rank]; dtype as A.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Returns:
        y, [..., out] in x's dtype.
    """
    y: torch.Tensor = _LoraLinear.apply(x, weight, bias, lora_a, lora_b, scale)  # type: ignore[no-untyped-call]
    return y


def matmul_as(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply two matrices and return the product in `dtype`.

    On CUDA, narrow inputs with an fp32 result keep the kernel's fp32 sum instead of rounding it first.
    """
    if left.is_cuda and left.dtype != dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight, bias, lora_a, lora_b, ctx.scale = args
        ctx.compute_weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.parameter_dtype = lora_a.dtype
        lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        tokens = x.reshape(-1, x.shape[-1])
        reduced = tokens @ lora_a.t()
        y = functional.linear(tokens, weight if ctx.compute_weight is None else weight(), bias)
        torch.addmm(y, reduced, lora_b.t(), alpha=ctx.scale, out=y)
        kept = weight if ctx.compute_weight is None else None
        ctx.save_for_backward(tokens, kept, lora_a, lora_b, reduced)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, weight, lora_a, lora_b, reduced = ctx.saved_tensors
        grad_y = grads[0].reshape(-1, grads[0].shape[-1])
        grad_reduced = (grad_y @ lora_b).mul_(ctx.scale)
        grad_x = None
        # Not needed for query, key and value of the first layer: the embedding before them is frozen.
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ (weight if ctx.compute_weight is None else ctx.compute_weight())
            grad_x = torch.addmm(grad_x, grad_reduced, lora_a, out=grad_x).view(ctx.shape)
        grad_a = matmul_as(grad_reduced.t(), tokens, ctx.parameter_dtype)
        grad_b = matmul_as(grad_y.t(), reduced, ctx.parameter_dtype).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None

"""A LoRA layer as one function: frozen weight and adapter in one walk over the tokens, gradients by hand.

PEFT's forward lifts a bf16 input to the adapter's fp32, multiplies there, and adds three tensors of
[tokens, out]. Here the adapter's fp32 master is rounded to the base's dtype for the time of the call, its
product is added in the GEMM itself (`addmm`), and the gradients of A and B are summed in fp32. No gradient
of the frozen weight is ever made. The parameters stay PEFT's own, so the adapter's files do too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """y = x W^T + b + scale (x A^T) B^T (Hu et al. 2021), without dropout.

    Args:
        x: [..., in], any float dtype. weight: [out, in] and bias: [out], frozen, of x's dtype.
        down: A, [lora_rank, in]. up: B, [out, lora_rank]. Both may be wider than x (fp32 over bf16).

    Returns:
        [..., out] in x's dtype.
    """
    made: torch.Tensor = _LoraLinear.apply(x, weight, bias, down, up, scale)  # type: ignore[no-untyped-call]
    return made


def matmul_as(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a b in `dtype`: on CUDA the kernel's own fp32 sum is kept instead of being rounded to a's dtype."""
    if a.is_cuda and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, weight, bias, down, up, ctx.scale = args
        ctx.master = down.dtype
        down, up = down.to(x.dtype), up.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        low = flat @ down.t()
        out = functional.linear(flat, weight, bias)
        torch.addmm(out, low, up.t(), alpha=ctx.scale, out=out)
        ctx.save_for_backward(flat, weight, down, up, low)
        ctx.shape = x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, weight, down, up, low = ctx.saved_tensors
        slope = grads[0].reshape(-1, grads[0].shape[-1])
        narrow = (slope @ up).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[
            0
        ]:  # the first layer's query, key and value have a frozen embedding before them
            dx = slope @ weight
            dx = torch.addmm(dx, narrow, down, out=dx).view(ctx.shape)
        d_down = matmul_as(narrow.t(), flat, ctx.master)
        d_up = matmul_as(slope.t(), low, ctx.master).mul_(ctx.scale)
        return dx, None, None, d_down, d_up, None

"""Compare the training kernels with fp32 references: python kernel_checks.py DEVICE DTYPE.

Random values, fresh on every run; a kernel passes when the norm of its error over the norm of its reference
is small for its dtype. Prints one JSON line {name: error}; exit 1 when one is not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import lora_task
import numpy as np
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trainer.data.chat_template import Example
from trainer.data.collator import collate
from trainer.model.forward import fused_norms, lora_forward, segment_attention, varlen_attention
from trainer.model.forward.lora_kernel import lora_linear
from trainer.model.forward.losses import PLAIN_HEAD, cross_entropy_sum, head_loss
from trainer.training.forward import pack_loss

BOUND = {"bfloat16": 2e-2, "float32": 1e-4}
WHOLE = {"bfloat16": 1e-3, "float32": 1e-5}  # relative difference of a two-layer student's loss
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}


def error(mine: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, on the CPU in fp64."""
    wide = reference.detach().double().cpu()
    return float((mine.detach().double().cpu() - wide).norm() / wide.norm())


def attention(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The packed path against each document alone, forward and backward, without and with a window."""
    yield from _attention(device, dtype, "attention", None)
    yield from _attention(device, dtype, "window", 24)


def _attention(
    device: str, dtype: torch.dtype, title: str, window: int | None
) -> Iterator[tuple[str, float]]:
    lengths = sorted((int(n) for n in np.random.default_rng().integers(3, 200, size=12)), reverse=True)
    q, k, v = (torch.randn(1, h, sum(lengths), 64, device=device, dtype=dtype) for h in (8, 2, 2))
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    own = [x.requires_grad_() for x in (q, k, v)]
    on_cuda = device == "cuda"
    path = varlen_attention if on_cuda else segment_attention
    bounds = (
        varlen_attention.document_bounds(lengths, device)
        if on_cuda
        else collate(_documents(lengths)).segments
    )
    options = {"scaling": 64**-0.5, "sliding_window": window}
    out, _ = path.attend(None, *own, None, segments=bounds, **options)
    parts, begin = [], 0
    for n in lengths:
        cut = [x[:, :, begin : begin + n] for x in wide]
        back = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None]
        seen = (back >= 0) & (back < (window or n))
        parts.append(functional.scaled_dot_product_attention(*cut, attn_mask=seen, enable_gqa=True))
        begin += n
    reference = torch.cat(parts, dim=2).transpose(1, 2)
    slope = torch.randn_like(reference)
    out.backward(slope.to(dtype))
    reference.backward(slope)
    yield title, error(out, reference)
    for name, mine, theirs in zip("qkv", own, wide, strict=True):
        yield f"{title} d{name}", error(mine.grad, theirs.grad)


def _documents(lengths: list[int]) -> list[Example]:
    return [Example(np.zeros(n + 1, np.int32), 1) for n in lengths]


def head(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The chunked head against cross-entropy over whole logits."""
    hidden = torch.randn(3000, 256, device=device, dtype=dtype)
    weight = torch.randn(8000, 256, device=device, dtype=dtype) / 16
    targets = torch.randint(8000, (3000,), device=device)
    wide, own = hidden.detach().float().requires_grad_(), hidden.requires_grad_()
    loss, _ = head_loss(own, weight, None, targets)
    reference, _ = cross_entropy_sum(functional.linear(wide, weight.float()), targets)
    loss.backward()
    reference.backward()
    yield "head loss", error(loss, reference)
    yield "head dx", error(own.grad, wide.grad)


def norm(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """A fused RMS norm against the model's own code in fp32; it must be found to be the same."""
    own = LlamaRMSNorm(896).to(device, dtype).requires_grad_(False)
    with torch.no_grad():
        own.weight.normal_(1, 0.3)
    wide = LlamaRMSNorm(896).to(device).requires_grad_(False)
    wide.weight.data = own.weight.detach().float()
    changed = fused_norms.fuse_norms(own)
    x = torch.randn(500, 896, device=device, dtype=dtype)
    mine, theirs = x.detach().requires_grad_(), x.detach().float().requires_grad_()
    out, reference = own(mine), wide(theirs)
    slope = torch.randn_like(reference)
    out.backward(slope.to(dtype))
    reference.backward(slope)
    yield "norm", error(out, reference) if changed else math.inf
    yield "norm dx", error(mine.grad, theirs.grad)


def lora(device: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The fused layer against the three products of its definition."""
    x = torch.randn(2000, 256, device=device, dtype=dtype)
    weight = torch.randn(512, 256, device=device, dtype=dtype) / 16
    down, up = (torch.randn(*s, device=device) / 16 for s in ((32, 256), (512, 32)))
    own = [t.detach().clone().requires_grad_() for t in (x, down, up)]
    wide = [t.detach().float().requires_grad_() for t in (x, down, up)]
    out = lora_linear(own[0], weight, None, own[1], own[2], 1.7)
    reference = wide[0] @ weight.float().t() + 1.7 * (wide[0] @ wide[1].t()) @ wide[2].t()
    slope = torch.randn_like(reference)
    out.backward(slope.to(dtype))
    reference.backward(slope)
    yield "lora", error(out, reference)
    for name, mine, theirs in zip(("dx", "dA", "dB"), own, wide, strict=True):
        yield f"lora {name}", error(mine.grad, theirs.grad)


def student_loss(device: str, dtype: str) -> float:
    """A two-layer student's loss here against the same weights in fp32 on the CPU."""
    task = lora_task.Task("", shape=TINY, device=device, dtype=dtype)
    path = varlen_attention.register() if device == "cuda" else segment_attention.register()
    here = lora_task.adapted(task, lora_task.base(task, path))
    lora_forward.replace_lora_forward(here)
    with torch.no_grad():
        for name, parameter in here.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    there = lora_task.adapted(
        task, lora_task.base(lora_task.Task("", shape=TINY), segment_attention.register())
    )
    there.load_state_dict({name: value.float().cpu() for name, value in here.state_dict().items()})
    ids = np.random.default_rng()
    pack = [Example(ids.integers(3, 4000, size=int(n), dtype=np.int32), 5) for n in (90, 60, 33, 12)]
    mine = pack_loss(here, collate(pack, device), head=PLAIN_HEAD)[0]
    theirs = pack_loss(there, collate(pack), head=PLAIN_HEAD)[0]
    return abs(float(mine) - float(theirs)) / float(theirs)


def main() -> None:
    device, dtype = sys.argv[1:]
    result: dict[str, Any] = {}
    for check in (attention, head, norm, lora):
        result.update(check(device, getattr(torch, dtype)))
    bad = [name for name, size in result.items() if not size < BOUND[dtype]]
    result["two-layer loss"] = student_loss(device, dtype)
    bad += [] if result["two-layer loss"] < WHOLE[dtype] else ["two-layer loss"]
    print(json.dumps({name: float(f"{size:.2e}") for name, size in result.items()}))
    if bad:
        sys.exit(f"off: {', '.join(bad)}")


if __name__ == "__main__":
    main()

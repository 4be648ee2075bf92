"""Keep the linear layers of a base in 4 bits: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

Weights are stored as NF4 in blocks of 64 along the flattened weight, the blocks' scales as 8-bit numbers in
blocks of 256 (double quantisation): 4.127 bits a weight. bitsandbytes converts them, on the CPU and on CUDA.
Embedding, norms and output layer stay as they are, and so do experts that are stacked in one tensor.

Why bitsandbytes and not torchao, as of bitsandbytes 0.50.2 and torchao 0.18.0 with torch 2.13 on one core:
a weight of 1024 x 1024 takes 0.5 ms to read, torchao's NF4 8.0 ms; torchao refuses weights whose number of
blocks is no multiple of 256. Of bitsandbytes only the two functions that convert a tensor are used, and each
weight is passed as one row: its CPU kernel begins a block with every row, so that a weight of 96 x 48 came
back with an error of 35 % instead of 9 %, without a word. What comes back is compared with what went in,
block by block (`_check`). Its layer `Linear4bit` is not used: in evaluation mode on a CPU it repacks weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from harvester.system.command_line.extras import require
from trainer.errors import StudentError
from trainer.model import structure

BLOCK = 64
SCALE_BLOCK = 256

# Half of NF4's widest gap, between -1 and -0.696, as a share of the largest value of a block.
MAX_ERROR = 0.153
# Error of a scale that is itself quantised, as a share of the largest scale of the layer, with a margin.
MAX_SCALE_ERROR = 0.02


class FourBitLinear(torch.nn.Linear):
    """Compute y = x W^T + b with a frozen W in 4 bits; no copy in full is kept for the backward pass.

    Args:
        layer: the layer to replace. On the meta device only the shapes are kept.
        device: holds the 4-bit weights, and converts them.
        name: of the layer, for errors.

    Raises:
        StudentError: the converted weights are not those of `layer`.
    """

    def __init__(self, layer: torch.nn.Linear, device: torch.device, name: str = "") -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.dtype = layer.weight.dtype
        self.register_parameter("bias", layer.bias)
        numel = layer.weight.numel()
        blocks = -(-numel // BLOCK)
        if layer.weight.is_meta:
            parts = {
                "packed": torch.empty(-(-numel // 2), 1, dtype=torch.uint8, device="meta"),
                "scales": torch.empty(blocks, dtype=torch.uint8, device="meta"),
                "scales_of_scales": torch.empty(-(-blocks // SCALE_BLOCK), device="meta"),
                "mean_scale": torch.empty((), device="meta"),
                "codes": torch.empty(16, device="meta"),
                "scale_codes": torch.empty(256, device="meta"),
            }
        else:
            parts = self._quantised(layer.weight.detach().to(device))
        for key, value in parts.items():
            self.register_buffer(key, value, persistent=False)
        if not layer.weight.is_meta:
            self._check(layer.weight.detach().to(device), name)

    @staticmethod
    def _quantised(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        packed, state = _functions().quantize_4bit(
            weight.contiguous().reshape(1, -1), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        return {
            "packed": packed,
            "scales": state.absmax,
            "scales_of_scales": state.state2.absmax,
            "mean_scale": state.offset,
            "codes": state.code,
            "scale_codes": state.state2.code,
        }

    def dequantised(self) -> torch.Tensor:
        """Return W [out, in], computed anew, in the dtype of the base."""
        library = _functions()
        of_scales = library.QuantState(
            absmax=self.scales_of_scales, code=self.scale_codes, blocksize=SCALE_BLOCK, dtype=torch.float32
        )
        state = library.QuantState(
            absmax=self.scales,
            shape=torch.Size((1, self.in_features * self.out_features)),
            code=self.codes,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
            offset=self.mean_scale,
            state2=of_scales,
        )
        weight: torch.Tensor = library.dequantize_4bit(self.packed, state)
        return weight.view(self.out_features, self.in_features)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W as `dequantised` returns it, so that others read what the layer computes with."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return self.dequantised()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Compute y [..., out] for x [..., in], both in the dtype of the base."""
        y: torch.Tensor = _Product.apply(input, self.dequantised, self.bias)  # type: ignore[no-untyped-call]
        return y

    def _check(self, weight: torch.Tensor, name: str) -> None:
        """Compare each block with what was converted; NF4 can't be further off than half a gap."""
        missing = -weight.numel() % BLOCK
        before, after = (
            functional.pad(values.float().flatten(), (0, missing)).view(-1, BLOCK)
            for values in (weight, self.dequantised())
        )
        largest = before.abs().amax(dim=1)
        allowed = (
            MAX_ERROR * largest + MAX_SCALE_ERROR * largest.max() + torch.finfo(self.dtype).eps * largest
        )
        error = (before - after).abs().amax(dim=1)
        if not bool((error <= allowed).all()):
            excess = float((error - allowed).max())
            raise StudentError(
                f"bitsandbytes {version('bitsandbytes')} returns other weights than it was given for "
                f"{name or 'a layer'}: off by up to {excess:.3g} more than 4 bits explain",
                place="student.quantise",
                remedy='set [student] quantise = "none" in train.toml, or install another version of '
                "bitsandbytes",
            )


class _Product(torch.autograd.Function):
    """Multiply by a weight that is computed in the forward and again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, compute_weight: Callable[[], torch.Tensor], bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.compute_weight = compute_weight
        weight = compute_weight()
        return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weight = ctx.compute_weight()
        return (grads[0].to(weight.dtype) @ weight).to(grads[0].dtype), None, None


def require_installed() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        MissingPackage: it is not installed.
    """
    require("qlora", '[student] quantise = "nf4"')


def _functions() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def quantise_base(base: Any, device: torch.device) -> int:
    """Replace the linear layers of a base's decoder by such in 4 bits, one after the other, in place.

    Args:
        base: a model of transformers, whose weights may be elsewhere than on `device`.

    Returns:
        The number of replaced layers.

    Raises:
        MissingPackage: bitsandbytes is not installed.
        StudentError: the base has no such layer, or a conversion is wrong.
    """
    require_installed()
    count = 0
    for name, parent, child in list(_linear_layers(base)):
        layer = getattr(parent, child)
        setattr(parent, child, FourBitLinear(layer, device, name))
        count += 1
    if not count:
        raise StudentError(
            "this student's decoder has no linear layer that 4 bits could hold",
            place="student.quantise",
            remedy='set [student] quantise = "none" in train.toml',
        )
    return count


def round_weights(base: Any) -> list[str]:
    """Give the layers of a base the values that 4 bits hold, and keep them as they are otherwise.

    Returns:
        The names of the changed weights.

    Raises:
        As `quantise_base`.
    """
    require_installed()
    names = []
    for name, parent, child in list(_linear_layers(base)):
        layer = getattr(parent, child)
        layer.weight.data = FourBitLinear(layer, layer.weight.device, name).dequantised()
        names.append(f"{name}.weight")
    return names


def _linear_layers(base: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield name, parent and name in the parent of each linear layer inside the decoder's layers."""
    names = {id(module): name for name, module in base.named_modules()}
    for layer in structure.decoder_layers(base):
        for parent in layer.modules():
            for child, module in parent.named_children():
                if type(module) is torch.nn.Linear:
                    yield names[id(module)], parent, child


def layers_of(student: torch.nn.Module) -> list[FourBitLinear]:
    """Return the layers of a student that are in 4 bits."""
    return [module for module in student.modules() if isinstance(module, FourBitLinear)]


def refuse_merges(student: torch.nn.Module) -> None:
    """Let an attempt to merge into 4-bit weights fail: PEFT would merge into a copy and lose it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise StudentError(
            "an adapter can't be merged into weights of 4 bits",
            place="student.quantise",
            remedy="`trainer export` merges it into the weights that the 4 bits stand for",
        )

    for module in student.modules():
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), FourBitLinear):
            module.merge = refuse


def describe(base: Any) -> str:
    """Describe for the operator what is in 4 bits, and what that takes."""
    layers = layers_of(base)
    packed = sum(buffer.numel() * buffer.element_size() for layer in layers for buffer in layer.buffers())
    return f"{len(layers):,} layers of the base in 4 bits (NF4): {packed / 2**20:,.1f} MiB"

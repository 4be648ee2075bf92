"""Test that RMS norms are replaced by torch's fused one where, and only where, that is the same function."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.trainer import tiny
from tests.trainer.model.test_losses import examples
from trainer import config as settings
from trainer.data.collator import collate
from trainer.model import model
from trainer.model.forward import fused_norms
from trainer.training import student
from trainer.training.forward import pack_loss


class Operations(TorchDispatchMode):
    """Count operations; a fused norm counts as one, as it is on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += "view" not in str(function)
        return function(*args, **(kwargs or {}))


def norm_of(kind, dtype):
    norm = kind(64, eps=1e-5).to(dtype).requires_grad_(False)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
def test_a_plain_norm_is_fused_and_says_the_same(kind, dtype):
    own = norm_of(kind, dtype)
    fused = copy.deepcopy(own)
    assert fused_norms.fuse_norms(fused) == 1
    x = torch.randn(3, 7, 64, dtype=dtype)
    for tensor in (x, x.float()):
        a, b = tensor.clone().requires_grad_(), tensor.clone().requires_grad_()
        first, second = own(a), fused(b)
        assert first.dtype == second.dtype
        first.float().square().sum().backward()
        second.float().square().sum().backward()
        scale = float(first.detach().abs().max())
        tolerance = scale * (2e-6 if dtype == torch.float32 else 2e-2)
        assert torch.allclose(first.float(), second.float(), atol=tolerance)
        error = (a.grad.float() - b.grad.float()).norm() / a.grad.float().norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("change", ["gemma", "trained", "epsilon", "other arguments"])
def test_what_is_another_function_or_is_trained_stays(change):
    norm = norm_of(GemmaRMSNorm if change == "gemma" else LlamaRMSNorm, torch.float32)
    if change == "trained":
        norm.requires_grad_(True)
    if change == "epsilon":
        norm.eps = 1e-3  # another one than it computes with
    if change == "other arguments":
        norm.forward = lambda hidden_states, gate: hidden_states * gate
    before = norm.forward
    assert fused_norms.fuse_norms(norm) == 0
    assert norm.forward == before


def test_a_wrong_kernel_is_not_taken(monkeypatch):
    right = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda x, *more: right(x.detach(), *more) + 0 * x)
    assert fused_norms.fuse_norms(norm_of(LlamaRMSNorm, torch.float32)) == 0, "its gradient is wrong"


def test_a_student_learns_the_same_with_fused_norms(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    made = model.load_new_student(config, torch.device("cpu"))
    pack = collate(examples(9))

    def learned():
        made.zero_grad()
        loss, _ = pack_loss(made, pack)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.trainable_parameters(made).values()]

    loss, wanted = learned()
    assert fused_norms.fuse_norms(made) == 5  # two of each layer, and the last
    again, found = learned()
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(wanted, found, strict=True))


def test_cuda_has_one_operation_each_way_for_a_norm():
    """Names and arguments in torch 2.11 and 2.13; how many operations of the own code they replace."""
    aten = torch.ops.aten
    forward, backward = aten._fused_rms_norm.default, aten._fused_rms_norm_backward.default
    assert [a.name for a in forward._schema.arguments] == ["input", "normalized_shape", "weight", "eps"]
    assert "rstd" in [a.name for a in backward._schema.arguments]
    own = norm_of(LlamaRMSNorm, torch.bfloat16)
    with Operations() as seen:
        own(torch.randn(7, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert seen.counts.total() > 15


@pytest.mark.parametrize(
    ("sections", "sharded", "fuses"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"compile": True}, False, False),
        ({"method": "full"}, False, False),
    ],
)
def test_norms_are_fused_on_cuda_unless_the_compiler_does_it(tmp_path, sections, sharded, fuses):
    lora = {"rank": 32, "alpha": 64}
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4), train=sections, lora=lora))
    assert student.fuses_norms(config, torch.device("cuda"), sharded=sharded) is fuses
    assert not student.fuses_norms(config, torch.device("cpu"), sharded=sharded)

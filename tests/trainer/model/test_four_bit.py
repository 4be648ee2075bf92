"""Test a base in 4 bits: its values, its gradients, and that a wrong conversion is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from harvester.errors import MissingPackage
from harvester.system.command_line import extras
from tests.trainer import tiny
from trainer import config as trainer_config
from trainer.errors import ConfigError, StudentError
from trainer.model import model
from trainer.model.forward import lora_forward
from trainer.model.four_bit import BLOCK, FourBitLinear
from trainer.training import memory

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed; run `make test-qlora`"
)
pytestmark = pytest.mark.qlora

CPU = torch.device("cpu")


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """NF4 by its definition: in blocks of 64 the nearest of 16 levels, times the block's largest value."""
    levels = torch.tensor(bitsandbytes.functional.get_4bit_type("nf4", device="cpu").tolist())
    flat = functional.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.abs().amax(dim=1, keepdim=True)
    chosen = ((flat / largest.clamp_min(1e-30))[..., None] - levels).abs().argmin(-1)
    return (levels[chosen] * largest).flatten()[: weight.numel()].view_as(weight)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 1000))
def test_a_layer_holds_the_nearest_of_sixteen_levels(rows, columns, seed):
    draw = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(columns, rows, bias=False)
    layer.weight.data = torch.randn(rows, columns, generator=draw) * 0.05
    held = FourBitLinear(layer, CPU).dequantised()
    wanted = nearest(layer.weight.data)
    # the scales are rounded, too: to 8 bits
    assert (held - wanted).abs().max() <= 0.02 * layer.weight.data.abs().max()


def test_forward_and_gradient_are_those_of_the_weights_it_holds():
    torch.manual_seed(0)
    layer = FourBitLinear(torch.nn.Linear(48, 96), CPU)
    x = torch.randn(5, 48, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    mine, x.grad = x.grad, None
    theirs = functional.linear(x, layer.dequantised(), layer.bias)
    theirs.square().sum().backward()
    assert torch.equal(y, theirs)
    assert torch.allclose(mine, x.grad, rtol=1e-5)
    kept = [each for each in layer.buffers() if each.dtype.is_floating_point]
    assert sum(each.numel() for each in kept) < layer.in_features * layer.out_features / 8


def test_a_conversion_that_is_wrong_is_refused_by_name(monkeypatch):
    """bitsandbytes' CPU kernel begins a block with every row, which `FourBitLinear` avoids: planted here."""
    original = bitsandbytes.functional.dequantize_4bit

    def by_rows(packed, state):
        state.shape = torch.Size((96, 48))
        return original(packed, state)

    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", by_rows)
    torch.manual_seed(0)
    with pytest.raises(StudentError, match="returns other weights than it was given for layer-7"):
        FourBitLinear(torch.nn.Linear(48, 96), CPU, "layer-7")


@pytest.fixture
def toml(tmp_path):
    return tiny.train_toml(tmp_path, tiny.skill(8), student={"quantise": "nf4"})


def test_the_fused_lora_forward_computes_what_peft_does(toml):
    config = trainer_config.load(toml)
    student = model.load_new_student(config, CPU)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    ids = torch.arange(3, 40)[None]

    def run():
        logits = student(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        return logits, gradients

    student.base_model.model.set_attn_implementation("eager")
    of_peft, wanted = run()
    assert lora_forward.replace_lora_forward(student) == 14
    assert lora_forward.slow_layers(student)[0] == 0
    fused, gradients = run()
    assert torch.allclose(of_peft, fused, atol=1e-5)
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        assert torch.allclose(gradient, gradients[name], rtol=1e-4, atol=1e-5), name


def test_no_adapter_is_merged_into_a_copy(toml):
    student = model.load_new_student(trainer_config.load(toml), CPU)
    with pytest.raises(StudentError, match="can't be merged"):
        student.merge_adapter()


def test_the_plan_counts_four_bits(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 512}
    sizes = {}
    for kind in ("none", "nf4"):
        path = tiny.train_toml(tmp_path / kind, tiny.skill(8), student={"quantise": kind})
        tiny.base(tmp_path / kind / "base", **shape)
        config = trainer_config.load(path)
        student = memory._empty_student(config, CPU, memory._UNKNOWN_FORWARD.layout)
        frozen = [*(p for p in student.parameters() if not p.requires_grad), *student.buffers()]
        sizes[kind] = sum(t.numel() * t.element_size() for t in frozen)
        real = model.load_new_student(config, CPU)
        held = [*(p for p in real.parameters() if not p.requires_grad), *real.buffers()]
        assert abs(sizes[kind] - sum(t.numel() * t.element_size() for t in held)) < 1024
    linear = 2 * (256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 512)
    saved = linear * (4 - 4.127 / 8)  # bytes a weight: fp32, against 4 bits and its scales
    assert abs(sizes["none"] - sizes["nf4"] - saved) < 0.02 * saved


def test_without_the_package_the_error_names_the_extra(toml, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage) as refused:
        model.load_new_student(trainer_config.load(toml), CPU)
    assert "blackbox-distillation[qlora]" in refused.value.remedy


def test_a_base_in_four_bits_is_neither_compiled_nor_split(tmp_path):
    toml = tiny.train_toml(
        tmp_path, tiny.skill(8), student={"quantise": "nf4"}, train={"compile": True, "shard": "always"}
    )
    config = trainer_config.load(toml)
    with pytest.raises(ConfigError, match="compiled"):
        model.check_without_weights(config)
    with pytest.raises(ConfigError, match="split"):
        memory.needs_sharding(config, 2)

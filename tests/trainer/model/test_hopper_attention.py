"""Test that FlashAttention 3 is taken only where it is installed, runs, and computes what torch's does."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig

from trainer.config import TrainSection
from trainer.model import model, self_test
from trainer.model.forward import hopper_attention, varlen_attention

CUDA = torch.device("cuda")


def plain(q, k, v, starts, _starts, _longest, _also, *, scale=None, window_size=(-1, -1)):
    outs = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*part, is_causal=True, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def wrong_where(is_wrong):
    """A kernel that is wrong for some longest documents and windows."""

    def kernel(q, k, v, starts, also, longest, *more, window_size, **named):
        out = plain(q, k, v, starts, also, longest, *more, window_size=window_size, **named)
        return 1.1 * out if is_wrong(longest, window_size[0]) else out

    return kernel


def broken(*_: object, **__: object) -> torch.Tensor:
    raise RuntimeError("no kernel image is available")


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU with the package, as far as Python sees; `active` says which kernel runs."""
    state = SimpleNamespace(active="FA2", capability=(9, 0), has_package=True, third=plain, calls=0)
    found = importlib.util.find_spec

    def find_spec(name, *more):
        return state.has_package or None if name == hopper_attention.PACKAGE else found(name, *more)

    def kernel(*arguments, **options):
        state.calls += 1
        return (state.third if state.active == "FA3" else plain)(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: state.capability)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        "torch.nn.attention.activate_flash_attention_impl", lambda name: setattr(state, "active", name)
    )
    monkeypatch.setattr(
        "torch.nn.attention.restore_flash_attention_impl", lambda: setattr(state, "active", "FA2")
    )
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: state.active)
    # The tensors of this test stay on the CPU.
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *more, **named: (
            to(self, *(m for m in more if m != CUDA), **named) if any(m != CUDA for m in more) else self
        ),
    )
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: kernel)
    hopper_attention.deactivate()
    yield state
    hopper_attention.deactivate()


def test_torch_has_the_functions_that_put_it_in_place():
    from torch.nn import attention

    assert hopper_attention.NAME in attention.list_flash_attention_impls()
    assert callable(attention.activate_flash_attention_impl)
    assert callable(attention.restore_flash_attention_impl)


def test_it_is_taken_on_a_hopper_gpu_after_it_was_compared(hopper):
    name = self_test.packed_attention(CUDA, LlamaConfig(head_dim=64))
    assert (name, hopper.active) == (varlen_attention.ATTENTION_NAME, "FA3")
    assert hopper.calls == 8, "both kernels were run, with and without windows and grouped heads"
    with model.arithmetic(TrainSection(deterministic=True), CUDA):
        assert hopper.active == "FA2", "a deterministic training takes torch's"


@pytest.mark.parametrize(
    ("change", "runs"),
    [
        ({"has_package": False}, False),
        ({"capability": (8, 0)}, False),
        ({"capability": (10, 0)}, False),
        ({"third": broken}, True),
        ({"third": lambda q, k, v, *more, **named: plain(q, k, 1.1 * v, *more, **named)}, True),
        ({"third": lambda q, k, v, *more, **named: plain(q.detach() + 0 * q, k, v, *more, **named)}, True),
        ({"third": wrong_where(lambda longest, window: longest > 128)}, True),
        ({"third": wrong_where(lambda longest, window: window >= 0)}, True),
    ],
    ids=[
        "not installed",
        "Ampere",
        "Blackwell",
        "fails",
        "other values",
        "other gradients",
        "long documents",
        "windows",
    ],
)
def test_torchs_kernel_stays_elsewhere(hopper, change, runs):
    vars(hopper).update(change)
    self_test.packed_attention(CUDA, LlamaConfig(head_dim=64))
    assert hopper.active == "FA2"
    assert (hopper.calls > 0) is runs


def test_what_failed_for_one_head_size_is_used_for_none(hopper):
    self_test.packed_attention(CUDA, LlamaConfig(head_dim=64))
    assert hopper.active == "FA3"
    hopper.third = broken
    self_test.packed_attention(CUDA, LlamaConfig(head_dim=128))
    assert hopper.active == "FA2"
    calls, hopper.third = hopper.calls, plain
    self_test.packed_attention(CUDA, LlamaConfig(head_dim=32))
    assert (hopper.active, hopper.calls) == ("FA2", calls)


def test_it_is_never_taken_for_a_deterministic_training(hopper, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    self_test.packed_attention(CUDA, LlamaConfig(head_dim=64))
    assert (hopper.active, hopper.calls) == ("FA2", 0)

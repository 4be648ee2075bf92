"""The chunked head, the varlen path and the FLOP count against references."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from tests.trainer import tiny
from trainer import config as settings
from trainer.data.chat_template import Example
from trainer.data.collator import Batch, batches, collate, padding_share
from trainer.errors import StudentError
from trainer.model import model
from trainer.model.forward import losses, varlen_attention
from trainer.model.forward.head import Head
from trainer.model.forward.losses import PLAIN_HEAD, cross_entropy_sum, head_loss
from trainer.model.forward.rows import RowLayout
from trainer.training import flops
from trainer.training.forward import pack_loss, supervised_logits


def examples(count: int = 7, seed: int = 5) -> list[Example]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 40, size=count)
    return [Example(draw.integers(3, 250, size=n).astype(np.int32), int(n) // 3) for n in lengths]


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_chunked_head_is_cross_entropy(monkeypatch, chunk, dtype):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 12, generator=draw, dtype=dtype, requires_grad=True)
    weight = torch.randn(50, 12, generator=draw, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (20,), generator=draw)
    loss, correct = head_loss(hidden, weight, None, targets)
    (loss * 0.5).backward()
    mine, hidden.grad = hidden.grad, None
    assert weight.grad is None  # a frozen head has no gradient, and none is made for it
    theirs, right = cross_entropy_sum(functional.linear(hidden, weight), targets)
    (theirs * 0.5).backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.equal(correct, right)
    assert torch.allclose(mine, hidden.grad, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_weighted_rows_have_the_loss_and_gradient_of_an_fp64_reference(monkeypatch, chunk):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(20, 12, generator=draw, requires_grad=True)
    weight = torch.randn(50, 12, generator=draw)
    targets = torch.randint(50, (20,), generator=draw)
    weights = torch.rand(20, generator=draw) * 3
    head = Head(scale=0.5, cap=5.0)
    loss, correct = head_loss(hidden, weight, None, targets, head=head, weights=weights)
    (loss / weights.sum()).backward()
    wide = hidden.detach().double().requires_grad_()
    logits = head.logits(functional.linear(wide, weight.double()))
    expected = (functional.cross_entropy(logits, targets, reduction="none") * weights.double()).sum()
    (expected / weights.double().sum()).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(hidden.grad.double(), wide.grad, atol=1e-7)
    assert correct == (logits.argmax(-1) == targets).sum(), "guesses count alike"
    plain, right = cross_entropy_sum(logits.detach().float(), targets, weights)
    assert plain.item() == pytest.approx(expected.item(), rel=1e-6)
    assert right == correct


def test_the_gradient_of_the_weighted_loss_passes_gradcheck():
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(9, (6,), generator=draw)
    weights = torch.rand(6, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, targets, weights)[0], (logits,))


def test_a_packs_weights_follow_its_documents(student):
    pack = [replace(e, weight=0.25 * (n + 1)) for n, e in enumerate(examples())]
    with torch.no_grad():
        together = pack_loss(student, collate(pack), head=PLAIN_HEAD)[0].item()
        alone = [pack_loss(student, collate([replace(e, weight=1.0)]), head=PLAIN_HEAD)[0] for e in pack]
    assert together == pytest.approx(sum(e.weight * float(loss) for e, loss in zip(pack, alone, strict=True)))
    assert collate([replace(e, weight=1.0) for e in pack]).weights is None, "rows alike cost nothing"
    wanted = {(int(t), e.weight) for e in pack for t in e.ids[e.prompt_length :]}
    for layout in (RowLayout(), RowLayout(packed=False)):
        laid = batches(pack, layout=layout)
        found = {pair for b in laid for pair in zip(b.targets.tolist(), b.weights.tolist(), strict=True)}
        assert found == wanted


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    config = settings.load(tiny.train_toml(folder, tiny.skill(4)))
    return model.load_new_student(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "more"), [(Qwen2Config, {}), (Qwen3Config, {"head_dim": 8}), (MistralConfig, {})]
)
def test_families_with_a_plain_head_lose_the_same_through_it(kind, more):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 260}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    from trainer.model.forward import segment_attention

    config = kind(**shape, **heads, **more, attn_implementation=segment_attention.register())
    made = AutoModelForCausalLM.from_config(config)
    batch = collate(examples())
    fused, right = pack_loss(made.requires_grad_(False), batch, head=PLAIN_HEAD)
    plain, also = cross_entropy_sum(supervised_logits(made, batch), batch.targets)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    assert torch.equal(right, also)


def test_the_flop_count_is_that_of_torchs_own_counter(student):
    [pack] = [examples(1)]
    student.base_model.model.set_attn_implementation("eager")  # counters don't know the CPU's fused kernel
    try:
        with FlopCounterMode(display=False) as seen:
            pack_loss(student, collate(pack), head=PLAIN_HEAD)[0].backward()
    finally:
        student.base_model.model.set_attn_implementation("distil_segments")
        student.zero_grad()
    assert flops.flop_counter(student, causal=False)(pack) == seen.get_total_flops()
    assert flops.flop_counter(student)(pack) < seen.get_total_flops()


def reference(q, k, v, starts, _starts, _longest, _also, *, scale=None, **options):
    """What the CUDA kernel computes, document by document."""
    assert options in ({"window_size": (-1, 0), "enable_gqa": True}, {"window_size": (-1, 0)})
    assert "enable_gqa" in options or q.shape[1] == k.shape[1]  # else keys are repeated by the caller
    outs = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        out = functional.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def old(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    """torch 2.11's signature: a window, but no grouped queries."""
    return reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def new(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch 2.13's."""
    more = {"window_size": window_size, "enable_gqa": enable_gqa}
    return reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, **more)


@pytest.mark.parametrize("kernel", [old, new])
def test_the_cuda_path_lays_documents_out_as_the_cpu_path_does(student, monkeypatch, kernel):
    pack = examples()
    batch = collate(pack)
    lengths = sorted((len(e.ids) - 1 for e in pack), reverse=True)
    bounds = varlen_attention.document_bounds(lengths, "cpu")
    assert bounds.starts[-1] == batch.tokens
    assert bounds.longest == lengths[0]
    on_cuda = Batch(batch.input_ids, batch.position_ids, batch.predict_at, batch.targets, bounds)
    monkeypatch.setattr(varlen_attention, "_kernel", lambda: kernel)
    here = supervised_logits(student, batch)
    student.base_model.model.set_attn_implementation(varlen_attention.register())
    try:
        on_the_device = supervised_logits(student, on_cuda)
    finally:
        student.base_model.model.set_attn_implementation("distil_segments")
    assert torch.allclose(here, on_the_device, atol=1e-5)


def test_what_the_kernel_would_leave_out_is_refused():
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(StudentError, match="softcap"):
        varlen_attention.attend(
            None, q, q, q, None, segments=varlen_attention.document_bounds([4], "cpu"), softcap=30.0
        )


def test_padding_is_what_attention_lays_out_beyond_tokens():
    rows = [Example(np.zeros(n + 1, np.int32), 1) for n in (8, 6, 2)]
    assert padding_share([rows]) == pytest.approx(2 / 18)  # a grid of 2 x 8 and one of 1 x 2
    assert padding_share([rows[:1]]) == 0

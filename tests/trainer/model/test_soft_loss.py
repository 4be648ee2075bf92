"""Compare the loss on sparse soft targets with the formula in fp64, its gradient with differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional

from trainer.model.forward import losses
from trainer.model.forward.head import Head
from trainer.model.forward.losses import cross_entropy_sum, head_loss, logits_loss, loss_and_gradient
from trainer.model.forward.soft_loss import LEAST_LOG_PROB, LEAST_TAIL, SoftMix, SoftRows

MIXES = [
    *(SoftMix(), SoftMix(1.0), SoftMix(0.3, 2.0), SoftMix(0.7, 1.0, "renormalise")),
    *(SoftMix(1.0, direction="reverse"), SoftMix(0.4, 2.0, direction="reverse")),
]


def rows(count=9, vocabulary=30, k=4, seed=1):
    """Rows with k tokens, one with fewer, one with none, and one whose probabilities sum to 1."""
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, vocabulary, generator=draw, dtype=torch.float64)
    targets = torch.randint(vocabulary, (count,), generator=draw)
    ids = torch.stack([torch.randperm(vocabulary, generator=draw)[:k] for _ in range(count)])
    probs = torch.rand(count, k, generator=draw, dtype=torch.float64)
    probs = probs / probs.sum(dim=1, keepdim=True) * torch.rand(count, 1, generator=draw)
    log_probs = probs.log()
    if count > 3:
        log_probs[1, 2:], ids[1, 2:] = -torch.inf, ids[1, 0]
        log_probs[2], ids[2] = -torch.inf, ids[2, 0]
        log_probs[3] = torch.log_softmax(log_probs[3], dim=0)
    return logits, targets, SoftRows(ids, log_probs)


def formula(logits, targets, soft, mix):
    """The definition, row by row, with the tail as log(1 - sum)."""
    total = torch.zeros((), dtype=logits.dtype)
    for row, target, ids, log_probs in zip(logits, targets, soft.ids, soft.log_probs, strict=True):
        entropy = functional.cross_entropy(row[None], target[None])
        listed = log_probs > -torch.inf
        if not listed.any():
            total = total + entropy
            continue
        q, p = torch.log_softmax(row, dim=0)[ids[listed]], log_probs[listed].to(row.dtype)
        if mix.tail == "renormalise":
            p = torch.log_softmax(p, dim=0)
        else:
            q = torch.cat([q, torch.log1p(-q.exp().sum())[None]])
            least = LEAST_TAIL if mix.direction == "reverse" else 0.0
            p = torch.cat([p, (1 - p.exp().sum()).clamp_min(least).log()[None]])
            q = torch.log_softmax(q / mix.temperature, dim=0)
            p = torch.log_softmax(p / mix.temperature, dim=0)
        if mix.direction == "reverse":
            p, q = q, p.clamp_min(LEAST_LOG_PROB)
        known = p > -torch.inf
        divergence = (p.exp()[known] * (p[known] - q[known])).sum()
        total = total + (1 - mix.weight) * entropy + mix.weight * mix.temperature**2 * divergence
    return total


@pytest.mark.parametrize("mix", MIXES)
def test_loss_and_gradient_are_those_of_the_formula(mix):
    logits, targets, soft = rows()
    logits.requires_grad_()
    loss, _ = logits_loss(logits, targets, partial(loss_and_gradient, mix=mix), soft)
    [mine] = torch.autograd.grad(loss, logits)
    wanted = formula(logits, targets, soft, mix)
    [theirs] = torch.autograd.grad(wanted, logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert torch.allclose(mine, theirs, atol=1e-10)


@pytest.mark.parametrize("mix", MIXES)
def test_the_gradient_is_that_of_finite_differences(mix):
    logits, targets, soft = rows(count=4, vocabulary=9, k=3)
    row_loss = partial(loss_and_gradient, mix=mix)
    assert torch.autograd.gradcheck(
        lambda x: logits_loss(x, targets, row_loss, soft)[0], [logits.requires_grad_()]
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("head", [Head(), Head(0.5, 20.0)])
def test_the_fused_head_agrees_with_the_formula(monkeypatch, mix, head):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    _, targets, soft = rows()
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(9, 12, generator=draw, requires_grad=True)
    weight = torch.randn(30, 12, generator=draw)
    loss, correct = head_loss(
        hidden, weight, None, targets, partial(loss_and_gradient, mix=mix), head, soft=soft
    )
    [mine] = torch.autograd.grad(loss, hidden)
    logits = head.logits(hidden.double() @ weight.double().t())
    [theirs] = torch.autograd.grad(formula(logits, targets, soft, mix), hidden)
    assert loss.item() == pytest.approx(formula(logits, targets, soft, mix).item(), rel=1e-5)
    assert torch.allclose(mine, theirs, atol=1e-4)
    assert correct == (logits.argmax(dim=-1) == targets).sum()


@pytest.mark.parametrize("mix", MIXES)
def test_the_order_of_the_alternatives_changes_nothing(mix):
    logits, targets, soft = rows(count=1)
    order = [2, 0, 3, 1]
    row_loss = partial(loss_and_gradient, mix=mix)
    shuffled = SoftRows(soft.ids[:, order], soft.log_probs[:, order])
    one, other = (row_loss(logits.clone(), targets, torch.float64, soft=s) for s in (soft, shuffled))
    assert one[0].item() == pytest.approx(other[0].item(), rel=1e-12)
    assert torch.allclose(one[2], other[2], atol=1e-12)


def test_rows_without_soft_targets_have_the_cross_entropy():
    logits, targets, soft = rows()
    empty = SoftRows(soft.ids[:, :1].expand(-1, 4), torch.full_like(soft.log_probs, -torch.inf))
    for mix in MIXES:
        loss, _, gradient = loss_and_gradient(logits.clone(), targets, torch.float64, soft=empty, mix=mix)
        plain, _, wanted = loss_and_gradient(logits.clone(), targets, torch.float64)
        assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
        assert torch.allclose(gradient, wanted, atol=1e-12)
        assert loss.item() == pytest.approx(cross_entropy_sum(logits, targets)[0].item(), rel=1e-5)


def test_a_student_without_a_tail_has_a_finite_gradient():
    logits, targets, soft = rows(count=1)
    logits[0] = -2000.0
    logits[0, soft.ids[0]] = 2000.0
    loss, _, gradient = loss_and_gradient(logits.float(), targets, torch.float32, soft=soft)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_a_student_equal_to_the_teacher_has_no_divergence_only_with_the_tail():
    logits, targets, soft = rows(count=1)
    teacher = torch.log_softmax(logits, dim=-1)
    equal = SoftRows(soft.ids, teacher.gather(1, soft.ids))
    for mix in (SoftMix(1.0), SoftMix(1.0, 3.0)):
        loss, _, gradient = loss_and_gradient(logits.clone(), targets, torch.float64, soft=equal, mix=mix)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert gradient.abs().max() < 1e-12
    mix = SoftMix(1.0, 1.0, "renormalise")
    gradient = loss_and_gradient(logits.clone(), targets, torch.float64, soft=equal, mix=mix)[2]
    assert gradient.gather(1, soft.ids).max() < 0  # every listed token is pushed up, though nothing is wrong


def test_the_reverse_direction_is_the_divergence_of_all_tokens_where_all_are_listed():
    """In fp64, value and gradient, against KL(student || teacher) over the whole vocabulary."""
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 12, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 12, generator=draw, dtype=torch.float64).log_softmax(dim=-1)
    log_probs = logits.log_softmax(dim=-1)
    exact = (log_probs.exp() * (log_probs - teacher)).sum()
    exact.backward()
    other = logits.detach().clone().requires_grad_()
    soft = SoftRows(torch.arange(12).repeat(5, 1), teacher)
    row_loss = partial(loss_and_gradient, mix=SoftMix(1.0, direction="reverse"))
    loss, _ = logits_loss(other, torch.zeros(5, dtype=torch.int64), row_loss, soft)
    loss.backward()
    # The teacher's tail counts as LEAST_TAIL, so its listed tokens have a ten thousandth less.
    assert loss.item() == pytest.approx(exact.item(), abs=5 * 2 * LEAST_TAIL)
    torch.testing.assert_close(other.grad, logits.grad, atol=2 * LEAST_TAIL, rtol=0)


def test_the_reverse_direction_is_finite_where_the_teacher_has_no_probability():
    logits = torch.tensor([[0.0, 30.0, -30.0]], dtype=torch.float64, requires_grad=True)
    soft = SoftRows(torch.tensor([[0, 1]]), torch.tensor([[0.0, -800.0]]))
    row_loss = partial(loss_and_gradient, mix=SoftMix(1.0, direction="reverse"))
    loss, _ = logits_loss(logits, torch.tensor([0]), row_loss, soft)
    loss.backward()
    assert loss.item() == pytest.approx(-LEAST_LOG_PROB, rel=1e-6)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.slow  # the compiler takes seconds
def test_torchs_compiler_computes_the_same():
    logits, targets, soft = rows()
    made = torch.compile(loss_and_gradient, dynamic=True, backend="aot_eager")
    mix = SoftMix(0.4, 2.0)
    with torch.no_grad():
        compiled = made(logits.float(), targets, torch.float32, soft=soft, mix=mix)
        plain = loss_and_gradient(logits.float(), targets, torch.float32, soft=soft, mix=mix)
    assert compiled[0].item() == pytest.approx(plain[0].item(), rel=1e-5)
    assert torch.allclose(compiled[2], plain[2], atol=1e-5)


def test_the_weight_of_a_row_scales_its_loss_and_gradient():
    logits, targets, soft = rows()
    weights = torch.arange(9, dtype=torch.float64)
    loss, _, gradient = loss_and_gradient(
        logits.clone(), targets, torch.float64, weights=weights, soft=soft, mix=SoftMix()
    )
    wanted = 0.0
    for row in range(9):
        part = slice(row, row + 1)
        alone, _, slope = loss_and_gradient(
            logits[part].clone(), targets[part], torch.float64, soft=soft.part(part)
        )
        assert torch.allclose(gradient[part], weights[row] * slope, atol=1e-12)
        wanted += weights[row].item() * alone.item()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)

"""Test how tokens of student and teacher are compared by bytes, and that the step follows the reverse KL."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.forward import losses
from trainer.model.forward.losses import cross_entropy_sum, head_loss
from trainer.onpolicy.groups import (
    LEAST_LOGPROB,
    UNSCORED,
    advantages,
    group,
    log_ratios,
    unscored,
    without_mean,
)


def tokens(*parts):
    """The teacher's tokens: (size, log-probability)."""
    at, made = 0, []
    for size, value in parts:
        made.append((at, at + size, value))
        at += size
    return made


def test_equal_tokens_are_groups_of_one():
    groups = group([1, 2], tokens((1, -1.0), (2, -0.5)), ends=True, end_logprob=-0.25)
    assert groups.of_token.tolist() == [0, 1, 2]
    assert groups.teacher.tolist() == [-1.0, -0.5, -0.25]
    mine = np.array([-0.5, -0.75, -0.25], dtype=np.float32)
    assert log_ratios(groups, mine).tolist() == [0.5, -0.25, 0.0]
    assert advantages(groups, mine).tolist() == [-0.5, 0.25, 0.0]
    assert advantages(groups, mine, 0.3).tolist() == pytest.approx([-0.3, 0.25, 0.0])


@pytest.mark.parametrize(
    ("sizes", "teacher", "of_token", "values"),
    [
        ([1, 1, 1], [(2, -1.0), (1, -2.0)], [0, 0, 1], [-1.0, -2.0]),  # a longer token of the teacher
        ([3], [(1, -1.0), (2, -2.0)], [0], [-3.0]),  # a longer token of the student
        ([1, 2], [(2, -1.0), (1, -2.0)], [0, 0], [-3.0]),  # none begins inside the other's
        ([1, 1], [(1, None), (1, -2.0)], [UNSCORED, 0], [-2.0]),
        ([2, 1], [(1, None), (1, -1.0), (1, -2.0)], [UNSCORED, 0], [-2.0]),
        ([1, 1], [(1, -1.0)], [0, UNSCORED], [-1.0]),  # the teacher's tokens end early
        ([1], [], [UNSCORED], []),
        ([], [], [], []),
    ],
)
def test_other_tokens_are_compared_between_common_bytes(sizes, teacher, of_token, values):
    groups = group(sizes, tokens(*teacher))
    assert groups.of_token.tolist() == of_token
    assert groups.teacher.tolist() == values
    assert groups.scored == sum(each != UNSCORED for each in of_token)


def test_a_gap_in_the_teachers_tokens_leaves_its_group_unknown():
    groups = group([2, 1], [(0, 1, -1.0), (2, 3, -2.0)])
    assert groups.of_token.tolist() == [UNSCORED, 0]


def test_impossible_tokens_count_as_hardly_possible_and_are_counted():
    groups = group([1, 1], tokens((1, -9999.0), (1, -1.0)), ends=True, end_logprob=-9999.0)
    assert groups.teacher.tolist() == [LEAST_LOGPROB, -1.0, LEAST_LOGPROB]
    assert groups.clipped == 2


def test_an_end_that_is_not_scored_has_no_advantage():
    assert group([1], tokens((1, -1.0)), ends=True).of_token.tolist() == [0, UNSCORED]
    assert advantages(unscored(3), np.zeros(3, dtype=np.float32)).tolist() == [0, 0, 0]


def test_a_baseline_leaves_unscored_tokens_and_differences_alone():
    first = group([1, 1], tokens((1, -1.0)))
    second = group([1], tokens((1, -4.0)))
    values = [advantages(g, np.zeros(len(g.of_token), dtype=np.float32)) for g in (first, second)]
    assert [v.tolist() for v in values] == [[-1.0, 0.0], [-4.0]]
    assert [v.tolist() for v in without_mean([first, second], values)] == [[1.5, 0.0], [-1.5]]


@given(
    text=st.integers(1, 30),
    mine=st.sets(st.integers(1, 29)),
    theirs=st.sets(st.integers(1, 29)),
    data=st.data(),
)
def test_groups_cover_the_text_and_keep_the_sums(text, mine, theirs, data):
    def sizes(cuts):
        bounds = [0, *sorted(cut for cut in cuts if cut < text), text]
        return [stop - first for first, stop in itertools.pairwise(bounds)]

    of_student, of_teacher = sizes(mine), sizes(theirs)
    values = data.draw(
        st.lists(st.floats(-0.5, 0.0, width=32), min_size=len(of_teacher), max_size=len(of_teacher))
    )
    groups = group(of_student, tokens(*zip(of_teacher, values, strict=True)))
    assert groups.scored == len(of_student)
    assert np.all(np.diff(groups.of_token) >= 0)
    common = set(np.cumsum(of_student)) & set(np.cumsum(of_teacher))
    assert len(groups.teacher) == len(common)  # as many groups as common ends
    assert groups.teacher.sum() == pytest.approx(sum(values), abs=1e-4)
    ratios = log_ratios(groups, np.full(len(of_student), -0.5, dtype=np.float32))
    assert ratios.sum() == pytest.approx(-0.5 * len(of_student) - sum(values), abs=1e-4)


def test_the_expected_step_is_the_gradient_of_the_reverse_kl():
    """Over all answers of one token, weighed by their probability, in fp64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(dim=-1)
    log_probs = logits.log_softmax(dim=-1)
    (log_probs.exp() * (log_probs - teacher)).sum().backward()

    expected = torch.zeros(7, dtype=torch.float64)
    for token in range(7):
        mine = log_probs.detach()[token]
        groups = group([1], [(0, 1, float(teacher[token]))])
        advantage = advantages(groups, np.array([float(mine)], dtype=np.float32))
        other = logits.detach().clone().requires_grad_()
        loss, _ = cross_entropy_sum(other[None], torch.tensor([token]), torch.tensor(advantage).double())
        loss.backward()
        expected += mine.exp() * other.grad
    torch.testing.assert_close(expected, logits.grad, atol=1e-6, rtol=1e-6)


def test_the_fused_head_follows_advantages_of_both_signs(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 3)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 5, generator=generator)
    weight = torch.randn(11, 5, generator=generator)
    targets = torch.randint(0, 11, (8,), generator=generator)
    advantage = torch.randn(8, generator=generator)

    fused = hidden.clone().requires_grad_()
    loss, _ = head_loss(fused, weight, None, targets, weights=advantage)
    loss.backward()

    exact = hidden.double().requires_grad_()
    log_probs = (exact @ weight.double().t()).log_softmax(dim=-1)
    reference = -(advantage.double() * log_probs.gather(1, targets[:, None])[:, 0]).sum()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(fused.grad.double(), exact.grad, atol=1e-5, rtol=1e-5)

    def of_logits(logits):
        return cross_entropy_sum(logits, targets, advantage.double())[0]

    logits = (hidden.double() @ weight.double().t()).requires_grad_()
    assert torch.autograd.gradcheck(of_logits, (logits,))

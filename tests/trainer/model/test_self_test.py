"""The self-test's parts: what attention refuses, how scale and cap of an output layer are found."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from tests.trainer import tiny
from tests.trainer.architectures import families
from tests.trainer.model.test_losses import examples
from trainer import config as settings
from trainer.data.collator import collate
from trainer.errors import StudentError
from trainer.model import model, self_test
from trainer.model.forward import segment_attention
from trainer.model.forward.head import Head, find_head
from trainer.model.forward.losses import cross_entropy_sum, head_loss
from trainer.model.tiny_copy import WINDOW, tiny_copy


@pytest.mark.parametrize("name", ["softcap", "s_aux", "indices", "block_indices", "sinks", "anything_new"])
def test_an_argument_that_is_not_known_to_be_harmless_is_refused(name):
    [group] = collate(examples(1)).segments
    q = torch.zeros(1, 2, group.end, 8)
    with pytest.raises(StudentError, match=name):
        segment_attention.attend(None, q, q, q, None, segments=(group,), **{name: 1.0})
    with pytest.raises(StudentError, match="is_causal"):
        segment_attention.attend(None, q, q, q, None, segments=(group,), is_causal=False)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("gemma2", Head(1.0, 30.0)),
        ("granite", Head(0.25)),
        ("cohere2", Head(0.0625)),
        ("llama", Head()),
        ("opt", Head()),
    ],
)
def test_scale_and_cap_are_measured_on_the_model(family, head):
    copy = tiny_copy(families.configuration(family)).requires_grad_(False)
    assert find_head(copy) == head


def test_a_scaled_and_capped_head_has_the_gradient_of_calculus():
    torch.manual_seed(0)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    targets, head = torch.randint(9, (11,)), Head(1.7, 2.5)
    loss, _ = head_loss(hidden, weight, bias, targets, head=head)
    loss.backward()
    result, hidden.grad = hidden.grad, None
    complete, _ = cross_entropy_sum(head.logits(torch.nn.functional.linear(hidden, weight, bias)), targets)
    complete.backward()
    assert loss.item() == pytest.approx(complete.item(), rel=1e-5)
    assert torch.allclose(result, hidden.grad, rtol=1e-4, atol=1e-5)


def test_a_window_that_only_the_mask_knows_is_found_although_it_is_longer_than_the_tests_documents():
    config = families.configuration("qwen2_moe")
    config.sliding_window = 4096
    copy = tiny_copy(config)
    assert copy.config.sliding_window == WINDOW < max(self_test.LENGTHS)
    assert not self_test.choose_forward(copy.requires_grad_(False), place="base").layout.packed


@pytest.mark.parametrize("fault", [None, segment_attention._ToGrid, segment_attention._ToTokens])
def test_a_gradient_that_only_packed_rows_have_is_found(tmp_path, monkeypatch, fault):
    """Logits don't show a wrong backward pass."""
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    student = model.load_new_student(config, torch.device("cpu"))
    if fault is not None:
        honest = fault.backward

        def wrong(ctx, *grads):
            first, *others = honest(ctx, *grads)
            return (first * 1.05, *others)

        monkeypatch.setattr(fault, "backward", staticmethod(wrong))
    forward = self_test.choose_forward(student, place="base")
    assert forward.layout.packed is (fault is None)
    assert ("gradient changes" in forward.note) is (fault is not None)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_documents_have_tokens_that_the_output_layer_knows():
    """CPM-Ant's embedding has rows of prompts that its output layer lacks."""
    copy = tiny_copy(CONFIG_MAPPING["cpmant"]())
    outputs = copy(input_ids=torch.tensor([[3, 4]])).logits.shape[-1]
    assert max(int(document.max()) for document in self_test.random_documents(copy)) < outputs

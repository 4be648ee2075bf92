"""Test that samples are those of the student's distribution, and do not depend on their batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.chat_template import Example
from trainer.model import generation_mode, self_test
from trainer.model.generate import Limits, SeededNoise, generate
from trainer.training.forward import token_scores

BASE = Path(__file__).resolve().parents[3] / "data" / "skills" / "student"


@pytest.fixture(scope="module")
def student():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = ["What is 12 + 30?", "Spell abc from back to front.", "say it"]
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns
    ]


def test_a_sample_does_not_depend_on_its_batch(student, prompts):
    limits = Limits(stop_id=2, max_new_tokens=12, batch=3, pad_id=0)
    together = generate(student, prompts, limits, seeds=[5, 6, 7])
    alone = [
        generate(student, [prompt], limits, seeds=[seed])[0]
        for prompt, seed in zip(prompts, (5, 6, 7), strict=True)
    ]
    assert together == alone
    assert generate(student, prompts, limits, seeds=[8, 9, 10]) != together


@pytest.mark.parametrize("modes", [0, 1], ids=["refilling", "whole batches"])
def test_no_token_is_sampled_that_the_tokenizer_does_not_have(prompts, monkeypatch, modes):
    """Bases embed more tokens than their tokenizers have; the bytes of these are not known."""
    student = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    known = student.get_input_embeddings().weight.shape[0]
    limits = Limits(stop_id=2, max_new_tokens=40, batch=3, pad_id=0)
    sampled = {
        token for answer in generate(student, prompts, limits, seeds=[5, 6, 7]) for token in answer.ids
    }
    student.resize_token_embeddings(known + len(sampled), mean_resizing=False)
    with torch.no_grad():
        rows = student.get_output_embeddings().weight
        rows[known:] = rows[sorted(sampled)]
    monkeypatch.setattr(generation_mode, "MODES", generation_mode.MODES[modes:])
    for positions in (0, max(map(len, prompts)) + 40):  # and one by one, where positions end
        every = replace(limits, positions=positions)
        for seeds in ([5, 6, 7], None):
            unbounded = generate(student, prompts, every, seeds=seeds)
            answers = generate(student, prompts, replace(every, tokens=known), seeds=seeds)
            assert max(token for answer in answers for token in answer.ids) < known
            if seeds:
                assert max(token for answer in unbounded for token in answer.ids) >= known


def test_noise_makes_samples_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 8_000
    noise = SeededNoise(range(count))
    tokens = noise(torch.empty(0), logits.expand(count, 4)).argmax(dim=-1)
    share = torch.bincount(tokens, minlength=4) / count
    # Four standard deviations of a share of 8,000 are at most 0.023.
    torch.testing.assert_close(share, logits.softmax(dim=-1), atol=0.023, rtol=0)


def test_log_probabilities_by_token_are_those_of_the_plain_forward(student, prompts):
    generator = np.random.default_rng(0)
    examples = [
        Example(np.array([*ids, *generator.integers(3, 600, size=size)], dtype=np.int32), len(ids))
        for ids, size in zip(prompts, (3, 9, 1), strict=True)
    ]
    student.requires_grad_(False)
    forward = self_test.check_student(student, BASE)
    with self_test.attention_of(student, forward.layout):
        values = token_scores(student, examples, torch.device("cpu"), forward)
    for example, found in zip(examples, values, strict=True):
        ids = torch.tensor(example.ids.astype(np.int64))[None]
        with torch.inference_mode():
            every = student(ids[:, :-1]).logits[0].log_softmax(dim=-1)
        expected = every.gather(1, ids[0, 1:, None])[example.prompt_length - 1 :, 0]
        assert found.log_probs == pytest.approx(expected.numpy(), abs=1e-4)
        assert np.isnan(found.divergences).all()

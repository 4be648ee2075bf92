"""Test that samples are those of the student's distribution, and do not depend on their batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainer import tiny
from trainer import config as settings
from trainer.data.chat_template import Example, Renderer
from trainer.model import generation_mode, model, self_test
from trainer.model.generate import Answer, Limits, SeededNoise, generate
from trainer.onpolicy.rounds import OnPolicy
from trainer.onpolicy.student import OnPolicyStudent
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


def cut_after(token, answers):
    """The answers, each cut after this token where it has it."""
    return [
        Answer(each.ids[: each.ids.index(token) + 1], is_cut=True) if token in each.ids else each
        for each in answers
    ]


@pytest.mark.parametrize("modes", [0, 1], ids=["refilling", "whole batches"])
def test_an_answer_is_cut_after_a_token_that_ends_it_on_servers(student, prompts, monkeypatch, modes):
    monkeypatch.setattr(generation_mode, "MODES", generation_mode.MODES[modes:])
    limits = Limits(stop_id=2, max_new_tokens=12, batch=3, pad_id=0)
    whole = generate(student, prompts, limits, seeds=[5, 6, 7])
    [token, *_] = [each.ids[1] for each in whole if len(each.ids) > 3]
    expected = cut_after(token, whole)
    assert expected != whole
    assert generate(student, prompts, replace(limits, cuts=(token,)), seeds=[5, 6, 7]) == expected
    alone = replace(limits, cuts=(token,), positions=max(map(len, prompts)) + 11)
    assert generate(student, prompts, alone, seeds=[5, 6, 7])[0].ids == expected[0].ids


def test_a_student_writes_nothing_after_the_other_tokens_at_which_servers_end(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    renderer = Renderer(model.load_tokenizer(config.base))
    asked = renderer.prompts([[{"role": "user", "content": f"say {n}"}] for n in range(4)])
    student = OnPolicyStudent(config, renderer, None)

    def answers():
        return student.answer(asked, [1, 2, 3, 4], 8, lambda _done: None, lambda _note: None)

    generation = config.base / "generation_config.json"
    generation.write_text("{}")
    whole = answers()
    [token, *_] = [each.ids[2] for each in whole if len(each.ids) > 4]
    generation.write_text(json.dumps({"eos_token_id": [renderer.chat_shape.stop_id, token]}))
    assert answers() == cut_after(token, whole) != whole


def test_stored_answers_of_tokens_that_the_tokenizer_lacks_are_sampled_again(tmp_path):
    """Those that an earlier version sampled: each further try ended with a traceback, too."""
    sampled = [Answer((1, 2), is_cut=False)]
    run = SimpleNamespace(
        _folder=tmp_path,
        _student=SimpleNamespace(sha256=lambda: "s", answer=lambda *_: sampled),
        _tokens=SimpleNamespace(data=[b"a", b"b", b"c"]),
        _settings=SimpleNamespace(max_new_tokens=4),
        _on_note=print,
    )
    assert OnPolicy._answers(run, "round-1", [[1]], [0]) == sampled
    path = tmp_path / "answers" / "round-1.json"
    stored = json.loads(path.read_text())
    for ids, found in (([0, 2], [Answer((0, 2), is_cut=False)]), ([0, 3], sampled)):
        path.write_text(json.dumps({**stored, "answers": [[ids, False]]}))
        assert OnPolicy._answers(run, "round-1", [[1]], [0]) == found


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

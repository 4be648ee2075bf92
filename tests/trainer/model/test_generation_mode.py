"""Answers in a batch are those that the student's own forward gives to each prompt alone."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, GenerationConfig

from tests.trainer.architectures import families
from tests.trainer.architectures.verbs import greedy_alone
from trainer.errors import StudentError
from trainer.model.generate import Limits, generate
from trainer.model.generation_mode import GenerationMode, choose_mode
from trainer.model.tiny_copy import tiny_copy

STOP = 127
PROMPTS = [[9, 8, 7, 6, 5], list(range(20, 41)), [11, 12, 13, 14, 15], [7, 8]]


def built(name):
    config = families.configuration(name) if name in families.FAMILIES else CONFIG_MAPPING[name]()
    return tiny_copy(config)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("llama", GenerationMode()),
        (
            "recurrent_gemma",
            GenerationMode(refills=False, pads=False),
        ),  # its recurrence runs over the padding
        ("llama4_text", GenerationMode(refills=False)),  # chunks of attention end at certain columns
        (
            "rwkv",
            GenerationMode(refills=False, pads=False, batches=False),
        ),  # its state mixes the prompts of a batch
        (
            "xlstm",
            GenerationMode(refills=False, pads=False, batches=False, caches=False),
        ),  # its cache has a wrong shape
    ],
)
def test_a_batch_gets_the_answers_of_each_prompt_alone(name, mode):
    model = built(name)
    notes = []
    limits = Limits(stop_id=STOP, max_new_tokens=4, batch=4, pad_id=3)
    answers = generate(model, PROMPTS, limits, on_note=notes.append)
    expected = [greedy_alone(model, prompt, 4, STOP) for prompt in PROMPTS]
    assert [answer.ids for answer in answers] == expected
    assert choose_mode(model) == mode
    assert notes == [mode.note] * (not mode.refills)
    assert bool(mode.note) == (not mode.refills)


def test_padding_without_the_check_changes_the_answers_of_a_recurrent_student():
    """The fault that the check is for: without it the expected answers are others."""
    model = built("recurrent_gemma")
    model.generation_config = GenerationConfig()
    ids = torch.tensor([[3] * 16 + PROMPTS[0], PROMPTS[1]])
    mask = torch.ones_like(ids)
    mask[0, :16] = 0
    padded = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=3
    )
    assert tuple(padded[0, 21:].tolist()) != greedy_alone(model, PROMPTS[0], 4, STOP)


def test_a_student_whose_generation_never_agrees_is_refused(monkeypatch):
    model = built("llama")
    honest = model.forward

    def unsteady(*args, **kwargs):
        output = honest(*args, **kwargs)
        if kwargs.get("attention_mask") is not None:  # as generation calls it
            output.logits = output.logits.flip(-1)
        return output

    monkeypatch.setattr(model, "forward", unsteady)
    with pytest.raises(StudentError, match=r"can't generate answers: logits change by"):
        choose_mode(model)

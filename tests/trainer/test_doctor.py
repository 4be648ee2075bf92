"""Twelve planted faults, each caught by its name; and a clean bill where there is none."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from tests.trainer import tiny
from tests.trainer.door import door, toml  # noqa: F401 - fixtures
from trainer import config as settings
from trainer import doctor
from trainer.render import Renderer


def rendered(monkeypatch, change) -> None:
    """Let every example come out of the renderer changed."""
    honest = Renderer.examples

    def examples(self, *args):
        return [change(example) for example in honest(self, *args)]

    monkeypatch.setattr(Renderer, "examples", examples)


def plant_no_supervised_token(path, monkeypatch):
    count = []

    def some(e):
        count.append(1)
        return replace(e, prompt_length=len(e.ids)) if len(count) % 2 else e

    rendered(monkeypatch, some)


def plant_end_never_learned(path, monkeypatch):
    rendered(monkeypatch, lambda e: replace(e, ids=e.ids[:-1]))


def plant_double_bos(path, monkeypatch):
    template = "{{ bos_token }}{{ bos_token }}" + tiny.CHATML
    tiny.tokenizer(template, bos_token="<s>").save_pretrained(path.parent / "base")


def plant_text_not_verbatim(path, monkeypatch):
    loud = tiny.tokenizer()
    loud.backend_tokenizer.normalizer = normalizers.Lowercase()
    loud.save_pretrained(path.parent / "base")
    tiny.corpus(path.parent / "store", [replace(s, completion="LOUD") for s in tiny.skill(8)])


def plant_cut_answer_taught_as_whole(path, monkeypatch):
    rows = tiny.skill(8)
    tiny.corpus(path.parent / "store", [replace(rows[0], finish_reason="length"), *rows[1:]])


def plant_pad_is_eos_and_masked(path, monkeypatch):
    honest = doctor.collate

    def masking(examples):
        batch = honest(examples)
        kept = batch.targets != 2  # what collators do that mask by id
        return replace(batch, targets=torch.where(kept, batch.targets, torch.tensor(-100)))

    monkeypatch.setattr(doctor, "collate", masking)


def plant_ids_out_of_range(path, monkeypatch):
    file = path.parent / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 50}))


def plant_leaked_prompt(path, monkeypatch):
    rows = tiny.skill(8, held_out=2)
    asked = rows[8].messages[0]["content"]
    spelt = [{"role": "user", "content": f"  {asked.upper()} "}]
    tiny.corpus(path.parent / "store", [replace(rows[0], messages=spelt), *rows[1:]])


def plant_shifted_border(path, monkeypatch):
    rendered(monkeypatch, lambda e: replace(e, prompt_length=e.prompt_length - 1))


def plant_control_token_in_answer(path, monkeypatch):
    def parsed(e):
        return replace(e, ids=np.insert(e.ids, e.prompt_length + 1, 1))

    rendered(monkeypatch, parsed)


def plant_unknown_tokens(path, monkeypatch):
    made = tiny.tokenizer(unk_token="<s>")
    made.save_pretrained(path.parent / "base")
    rendered(monkeypatch, lambda e: replace(e, ids=np.insert(e.ids, e.prompt_length, made.unk_token_id)))


def plant_most_rows_too_long(path, monkeypatch):
    rows = tiny.skill(8)
    tiny.corpus(
        path.parent / "store", [replace(s, completion="x" * 300) if i > 2 else s for i, s in enumerate(rows)]
    )


FAULTS = [
    (plant_no_supervised_token, "no supervised token: 20 of 40"),
    (plant_end_never_learned, "end of turn is not learned: 40 of 40"),
    (plant_double_bos, "begins with two BOS tokens: 40 of 40"),
    (plant_text_not_verbatim, "not verbatim: 8 of 8"),
    (plant_cut_answer_taught_as_whole, "taught as whole: 1 of 8"),
    (plant_pad_is_eos_and_masked, "masked by its id): 40 of 40"),
    (plant_ids_out_of_range, "token ids outside the model's 50: 40 of 40"),
    (plant_leaked_prompt, "under another spelling: 1 of 8"),
    (plant_shifted_border, "is not the prompt served: 40 of 40"),
    (plant_control_token_in_answer, "control tokens inside the answer: 40 of 40"),
    (plant_unknown_tokens, "unknown tokens in the answer: 40 of 40"),
    (plant_most_rows_too_long, "too long to learn: 5 of 8"),
]


@pytest.mark.parametrize(("plant", "said"), FAULTS, ids=[f.__name__[6:] for f, _ in FAULTS])
def test_a_planted_fault_is_fatal_by_name(door, toml, monkeypatch, plant, said):  # noqa: F811
    plant(toml, monkeypatch)
    code, _, err = door("doctor", toml)
    assert code == 1
    assert said in err


def test_a_clean_corpus_gets_a_clean_bill(door, toml):  # noqa: F811
    code, out, _ = door("doctor", toml)
    assert code == 0
    assert out.count("⟦") == doctor.SHOWN
    assert doctor.diagnose(settings.load(toml)).findings == ()


@pytest.mark.parametrize("pad", [{"pad_token": "<|im_end|>"}, {"pad_token": None}])
def test_pad_that_equals_eos_is_no_fault_here(toml, pad):  # noqa: F811
    tiny.tokenizer(**pad).save_pretrained(toml.parent / "base")
    assert doctor.diagnose(settings.load(toml)).findings == ()


def test_a_cut_answer_learned_without_its_end_is_no_fault(toml):  # noqa: F811
    rows = tiny.skill(8)
    cut = replace(rows[0], finish_reason="length", outcome="truncated")
    tiny.corpus(toml.parent / "store", [cut, *rows[1:]])
    toml.write_text(toml.read_text().replace("[lora]", 'truncated = "unterminated"\n[lora]'))
    assert doctor.diagnose(settings.load(toml)).findings == ()

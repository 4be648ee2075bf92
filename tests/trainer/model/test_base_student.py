"""Test the tiny base student: loads with plain libraries, uses ChatML, and was never shown a task."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from harvester_data import base_facts, base_text, make_base
from harvester_data.base_document import NAMES, WORDS
from harvester_data.base_tokenizer import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS
from harvester.mock_teacher.tasks.rules import solve

ROOT = Path(__file__).resolve().parents[3]
BASE = ROOT / "data" / "base"
TURNS = [
    {"role": "user", "content": "Reverse the string abcd."},
    {"role": "assistant", "content": "dcba"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def test_it_is_small_enough_for_git():
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 5_000_000


def test_the_committed_tokenizer_is_what_the_script_makes(tokenizer: PreTrainedTokenizerBase):
    made = make_tokenizer((*WORDS, *NAMES))
    assert made.get_vocab() == tokenizer.get_vocab()
    assert made.chat_template == tokenizer.chat_template


def test_the_chat_template_marks_roles_and_ends_turns(tokenizer: PreTrainedTokenizerBase):
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nReverse the string abcd.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == prompt + "dcba<|im_end|>\n"
    marked = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    learned = [token for token, on in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(learned) == "dcba<|im_end|>"
    assert learned[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@given(text=st.text(max_size=200))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str):
    if any(mark in text for mark in ("<|im_start|>", "<|im_end|>", "<|pad|>")):
        return
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_content_is_spelled_out_and_instructions_are_not(tokenizer: PreTrainedTokenizerBase):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Reverse the string abcd.")["input_ids"])
    assert pieces == ["Reverse", "Ġthe", "Ġstring", "Ġ", "a", "b", "c", "d", "."]


def test_the_text_it_saw_asks_for_no_task_and_repeats_itself():
    documents = list(islice(base_text.stream(make_base.SEED, make_base.PHASES), 40_000))
    assert documents[:500] == list(islice(base_text.stream(make_base.SEED, make_base.PHASES), 500))
    assert all(solve(document.text) is None for document in documents)
    # Nor does it continue one: no text holds the words of a phrasing around a content.
    openings = {phrasing.split("{")[0] for phrasings in PHRASINGS.values() for phrasing in phrasings.train}
    openings = {opening for opening in openings if len(opening.split()) > 2}
    assert not [entry for entry in documents if any(opening in entry.text for opening in openings)]


def test_kin_skills_never_work_on_the_symbols_of_the_tasks():
    rng = random.Random(0)
    for skill in (base_text.mirror, base_text.rank, base_text.tally, base_text.hop):
        for _ in range(500):
            document = skill(rng)
            assert document.reply is not None
            assert not any(letter.islower() for letter in document.reply)
    for _ in range(2_000):
        document = base_text.both(rng)
        numbers = [word.strip(".?") for word in document.text.split() if word[0].isdigit()]
        assert sum(number.isdigit() and len(number) == 2 for number in numbers) < 2
    assert base_facts.digit_facts(rng).reply is None


def test_untouched_it_solves_next_to_nothing(tokenizer: PreTrainedTokenizerBase):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    lines = (ROOT / "prompts" / "skills-held-out.jsonl").read_text(encoding="utf-8").splitlines()
    every: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in map(json.loads, lines):
        if row["split"] in ("held_out", "held_out_task"):
            every[row["task"]].append(row)
    rows = [row for task in every.values() for row in task[:40]]  # the demo's scorecard has all of them
    right: dict[str, list[bool]] = defaultdict(list)
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    prompt = tokenizer(prompts, padding=True, return_tensors="pt")
    answers = model.generate(**prompt, max_new_tokens=24, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    for row, answer in zip(rows, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
        right[row["task"]].append(answer.strip() == row["reference"])
    assert set(right) == set(PHRASINGS)
    assert len(right[DOUBLE]) == 40
    for task, verdicts in right.items():
        assert sum(verdicts) / len(verdicts) <= 0.05, task

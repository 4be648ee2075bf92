"""Check the committed neural teachers and student bases: what their cards say, and a few answers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from harvester_data import make_neural_teacher, skill_rows
from harvester_data.make_base import prompt_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.mock_teacher.neural.worker import load
from tests.tiers import rest_is_slow

SKILLS = Path(__file__).resolve().parents[1] / "data" / "skills"
TEACHER = SKILLS / make_neural_teacher.NAME
WEAK = SKILLS / "weaker" / "mock-teacher"
UNSURE = SKILLS / "unsure" / "mock-teacher"
STUDENTS = (SKILLS / "student", SKILLS / "student_bpe")


def card_of(folder):
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize(
    "folder", [TEACHER, WEAK, UNSURE, *STUDENTS], ids=lambda folder: str(folder.relative_to(SKILLS))
)
def test_a_card_belongs_to_its_model_and_to_the_rows_of_today(folder):
    card = card_of(folder)
    assert card["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert card["vocabulary"] == len(AutoTokenizer.from_pretrained(folder))
    assert card["test_sha256"] == make_neural_teacher.digest_of(skill_rows.held_out_rows())
    gold = list(islice(skill_rows.gold_rows(), 1000))
    assert card["gold_first_1000_sha256"] == make_neural_teacher.digest_of(gold)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_500_000


@pytest.mark.parametrize(
    "folder", rest_is_slow([TEACHER, WEAK], first=1), ids=lambda folder: str(folder.relative_to(SKILLS))
)
def test_a_teacher_is_as_accurate_as_its_card_says(folder):
    card = card_of(folder)["accuracy"]["held_out"]
    assert 0.85 <= card["macro"] < 1
    model, tokenizer = load(folder)
    rows = [row for row in skill_rows.held_out_rows() if row["split"] == "held_out"][::16]
    shares = make_neural_teacher.score(model, tokenizer, rows)["held_out"]
    assert len(shares) == len(card) == 9
    # 80 rows: four standard errors are 0.15.
    assert shares["macro"] == pytest.approx(card["macro"], abs=0.15)


def test_the_weaker_teacher_leaves_errors_to_remove():
    assert card_of(WEAK)["accuracy"]["held_out"]["macro"] <= 0.97


def test_the_unsure_teacher_leaves_much_beside_its_top_five():
    model, _ = load(UNSURE)
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(UNSURE)
    rows = [row for row in skill_rows.held_out_rows() if row["split"] == "held_out"][::32]
    left = []
    for row in rows:
        question = prompt_ids(row["prompt"], tokenizer)
        answer = tokenizer(row["reference"], add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*question, *answer]])).logits[0, len(question) - 1 :]
        left += (1 - logits.softmax(dim=-1).topk(5).values.sum(dim=-1)).tolist()
    assert sum(left) / len(left) > 0.05


@pytest.mark.parametrize(
    "folder", rest_is_slow(STUDENTS, first=1), ids=lambda folder: str(folder.relative_to(SKILLS))
)
def test_a_student_base_answers_nothing_before_it_is_taught(folder):
    accuracy = card_of(folder)["accuracy"]
    assert all(
        accuracy[split]["macro"] <= 0.05 for split in ("held_out", "held_out_phrasing", "held_out_task")
    )
    model, tokenizer = load(folder)
    rows = [row for row in skill_rows.held_out_rows() if row["split"] == "held_out"][::16]
    assert make_neural_teacher.score(model, tokenizer, rows)["held_out"]["macro"] <= 0.05


def test_one_student_has_the_teachers_tokens_and_the_other_has_not():
    prompts = [row["prompt"] for row in skill_rows.held_out_rows()[::100]]
    teacher, same, other = (AutoTokenizer.from_pretrained(folder) for folder in (TEACHER, *STUDENTS))
    assert same.get_vocab() == teacher.get_vocab()
    assert same(prompts)["input_ids"] == teacher(prompts)["input_ids"]
    assert other.get_vocab() != teacher.get_vocab()
    assert all(other(prompt)["input_ids"] != teacher(prompt)["input_ids"] for prompt in prompts)

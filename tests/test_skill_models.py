"""Check the committed neural teacher: what its card says, and a few answers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from harvester_data import make_neural_teacher, skill_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.mock_teacher.neural.worker import load

SKILLS = Path(__file__).resolve().parents[1] / "data" / "skills"
TEACHER = SKILLS / make_neural_teacher.NAME


def card_of(folder):
    return json.loads((folder / "measured.json").read_text())


@pytest.mark.parametrize("folder", [TEACHER], ids=lambda folder: folder.name)
def test_a_card_belongs_to_its_model_and_to_the_rows_of_today(folder):
    card = card_of(folder)
    assert card["parameters"] == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert card["vocabulary"] == len(AutoTokenizer.from_pretrained(folder))
    assert card["test_sha256"] == make_neural_teacher.digest_of(skill_rows.held_out_rows())
    gold = list(islice(skill_rows.gold_rows(), 1000))
    assert card["gold_first_1000_sha256"] == make_neural_teacher.digest_of(gold)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_500_000


def test_the_teacher_is_as_accurate_as_its_card_says():
    card = card_of(TEACHER)["accuracy"]["held_out"]
    assert 0.85 <= card["macro"] < 1
    model, tokenizer = load(TEACHER)
    rows = [row for row in skill_rows.held_out_rows() if row["split"] == "held_out"][::16]
    shares = make_neural_teacher.score(model, tokenizer, rows)["held_out"]
    assert len(shares) == len(card) == 9
    # 80 rows: four standard errors are 0.15.
    assert shares["macro"] == pytest.approx(card["macro"], abs=0.15)

"""Check a student's documents: valid by their formats' schemas, and complete about every duty."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.harvester.export.test_cards import DUTY, MIXES, MODELS, dataset, head_of, validator, with_duties
from trainer.provenance.cyclonedx import ml_bom
from trainer.provenance.eu_summary import eu_summary
from trainer.provenance.model_card import model_card
from trainer.provenance.student_facts import StudentFacts

CYCLONEDX = validator("cyclonedx-1.7.json")


def student(*ids: str, **more: Any) -> StudentFacts:
    facts: dict[str, Any] = {
        "name": "Llama-tiny",
        "version": "1.0.0",
        "base": "Qwen/Qwen3-0.6B",
        "base_licence": "apache-2.0",
        "trained_on": date(2026, 11, 24),
        "dataset": dataset(*ids),
        "sha256": "d" * 64,
        "base_sha256": "e" * 64,
        **more,
    }
    return StudentFacts(**facts)


@pytest.mark.parametrize("ids", MIXES)
def test_the_bill_of_materials_is_valid_cyclonedx(ids: tuple[str, ...]):
    bom = ml_bom(student(*ids), tool_version="0.1.0")
    assert [error.message for error in CYCLONEDX.iter_errors(bom)] == []
    assert {c["name"] for c in bom["components"]} >= {MODELS[name] for name in ids}
    refs = {c["bom-ref"] for c in bom["components"]} | {"student"}
    for each in bom["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= refs
    assert json.loads(json.dumps(bom)) == bom


def test_the_schema_does_refuse():
    bom = ml_bom(student("llama-3.1"), tool_version="0.1.0")
    for broken in ({**bom, "specVersion": 1.7}, {**bom, "extra": 1}, {**bom, "serialNumber": "x"}):
        assert list(CYCLONEDX.iter_errors(broken))
    bom["components"][0]["licenses"] = [{"license": {"id": "Apache-3.0"}}]
    assert list(CYCLONEDX.iter_errors(bom))


def test_the_serial_number_follows_the_facts():
    def number(of: StudentFacts) -> str:
        return str(ml_bom(of, tool_version="0.1.0")["serialNumber"])

    assert number(student("llama-3.1")) == number(student("llama-3.1"))
    assert number(student("llama-3.1")) != number(student("llama-3.1", sha256="f" * 64))


def test_the_model_card_shows_what_has_to_be_displayed():
    card = model_card(student("llama-3.1", "qwen-licence-2024"), [("exact answers", "81 of 100")])
    head = head_of(card)
    assert head["base_model"] == "Qwen/Qwen3-0.6B"
    assert head["base_model_relation"] == "adapter"
    assert head["license"] == "apache-2.0"
    for part in ("**Built with Llama**", "**Improved using Qwen**", "81 of 100"):
        assert part in card


@pytest.mark.parametrize(
    ("ids", "licence"),
    [
        (("qwen3.8-27b-apache",), "apache-2.0"),
        (("gemma-1-to-3",), "gemma"),
        (("minimax-m3",), "cc-by-nc-4.0"),
        (("gemma-1-to-3", "minimax-m3"), "other"),
    ],
)
def test_the_students_licence_is_what_the_duties_force(ids: tuple[str, ...], licence: str):
    assert head_of(model_card(student(*ids)))["license"] == licence


def test_the_eu_item_names_models_and_says_it_is_probably_not_required():
    text = eu_summary(student("llama-3.1"))
    for part in (
        "2.5. Synthetic data",
        "meta-llama/Llama-3.1-8B-Instruct",
        "Probably not required",
        "not legal advice",
    ):
        assert part in text


def test_the_documents_say_that_answers_are_a_mock_teachers():
    facts = student("mock-teacher", "qwen3.8-27b-apache")
    for text in (model_card(facts), eu_summary(facts), json.dumps(ml_bom(facts, tool_version="0.1.0"))):
        assert "mock teacher" in text


@given(st.lists(DUTY, max_size=6, unique=True))
def test_the_card_carries_the_words_of_every_duty(duties: list[str]):
    card = model_card(replace(student("qwen3.8-27b-apache"), dataset=with_duties(duties)))
    for duty in duties:
        assert " ".join(duty.partition(":")[2].split()) in card

"""Check a data set's documents: valid by their formats' schemas, and complete about every duty."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harvester.export.cards.croissant import croissant
from harvester.export.cards.dataset_card import dataset_card, size_category
from harvester.export.cards.facts import DatasetFacts, ShardFacts, records_of
from harvester.export.cards.notice import notice
from harvester.terms import gate
from harvester.terms.lineage import Lineage

SCHEMAS = Path(__file__).with_name("schemas")
SHIPPED = gate.load_registry()
MODELS = {
    "mock-teacher": "mock-teacher",
    "llama-3.1": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma-1-to-3": "google/gemma-3-4b-it",
    "minimax-m3": "MiniMaxAI/MiniMax-M3",
    "qwen-licence-2024": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3.8-27b-apache": "Qwen/Qwen3.8-27B",
    "nvidia-nemotron-open": "nvidia/nemotron-3-nano",
}


def dataset(*ids: str, **more: Any) -> DatasetFacts:
    lineages = tuple(
        Lineage(
            {
                "run_id": f"run-{number}",
                "host": "127.0.0.1:8000",
                "model": MODELS[name],
                "terms_id": name,
                "permission_sha256": "",
                "purpose": "train",
                "mock": name == "mock-teacher",
                "duties": list(SHIPPED.records[name].duties),
                "config_sha256": "c" * 64,
                "tool_version": "0.1.0",
            }
        )
        for number, name in enumerate(ids)
    )
    facts: dict[str, Any] = {
        "name": "my-answers",
        "version": "1.0.0",
        "url": "https://example.com/my-answers",
        "creator": "An Operator",
        "published": date(2026, 11, 24),
        "shards": (
            ShardFacts("shards/00000.parquet", "a" * 64, 900, 12345),
            ShardFacts("shards/00001.parquet", "b" * 64, 200, 99),
        ),
        "lineages": lineages,
        "records": records_of(lineages, SHIPPED),
        "prompt_sources": ("arithmetic.jsonl, CC0-1.0",),
        **more,
    }
    return DatasetFacts(**facts)


def head_of(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    loaded: dict[str, Any] = yaml.safe_load(head)
    return loaded


def validator(name: str) -> Any:
    schema = json.loads((SCHEMAS / name).read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema, format_checker=jsonschema.FormatChecker())


CROISSANT = validator("croissant-1.1.json")
MIXES = [("mock-teacher",), ("qwen3.8-27b-apache",), ("llama-3.1", "gemma-1-to-3"), tuple(MODELS)]


@pytest.mark.parametrize("ids", MIXES)
def test_croissant_has_what_the_specification_requires(ids: tuple[str, ...]):
    facts = croissant(dataset(*ids))
    assert [error.message for error in CROISSANT.iter_errors(facts)] == []
    known = {each["@id"] for each in facts["distribution"]}
    fields = facts["recordSet"][0]["field"]
    assert all(field["source"]["fileSet"]["@id"] in known for field in fields)
    assert facts["recordSet"][0]["key"]["@id"] in {field["@id"] for field in fields}
    assert {each["termCode"] for each in facts["usageInfo"]} == set(ids)
    assert [f["sha256"] for f in facts["distribution"] if "sha256" in f] == ["a" * 64, "b" * 64]


def test_the_croissant_schema_refuses_a_missing_property():
    facts = croissant(dataset("llama-3.1"))
    for absent in ("license", "datePublished", "creator", "distribution"):
        assert list(CROISSANT.iter_errors({k: v for k, v in facts.items() if k != absent}))


def test_the_data_set_card_names_teachers_terms_and_files():
    card = dataset_card(dataset("llama-3.1", "qwen-licence-2024"))
    head = head_of(card)
    assert head["license"] == "other"
    assert head["license_name"] == "llama-3.1-and-qwen-2024"
    assert head["license_link"] == "NOTICE"
    assert head["size_categories"] == ["1K<n<10K"]
    assert {"synthetic", "distillation", "distil"} <= set(head["tags"])
    for part in (
        "meta-llama/Llama-3.1-8B-Instruct",
        "second-hand",
        "seen 2026-11-01",
        "a" * 64,
        "not legal advice",
    ):
        assert part in card


@pytest.mark.parametrize(
    ("ids", "licence"),
    [
        (("qwen3.8-27b-apache",), "apache-2.0"),
        (("llama-3.1", "qwen3.8-27b-apache"), "other"),
    ],
)
def test_a_licence_that_the_hub_knows_is_named_by_its_id(ids: tuple[str, ...], licence: str):
    head = head_of(dataset_card(dataset(*ids)))
    assert head["license"] == licence
    assert ("license_name" in head) == (licence == "other")


def test_the_notice_carries_notices_and_terms():
    text = notice(dataset("gemma-1-to-3", "nvidia-nemotron-open", "minimax-m3"), title="my-answers")
    for part in (
        "Gemma is provided under and subject to the Gemma Terms of Use",
        "https://ai.google.dev/gemma/prohibited_use_policy",
        "NVIDIA Nemotron Open Model License",
        "non-commercial use only",
    ):
        assert part in text


def test_the_documents_say_that_answers_are_a_mock_teachers():
    facts = dataset("mock-teacher", "qwen3.8-27b-apache")
    card = dataset_card(facts)
    assert "mock teacher" in card
    assert "mock teacher" in json.dumps(croissant(facts))
    assert "mock" in head_of(card)["tags"]


DUTY = st.builds(
    lambda kind, words: f"{kind}:{words}",
    st.sampled_from(["display", "notice", "pass_terms"]),
    st.text("abcXYZ 0123.-/", min_size=1, max_size=40).filter(lambda words: words.strip() == words),
)


def with_duties(duties: list[str]) -> DatasetFacts:
    plain = dataset("qwen3.8-27b-apache")
    return replace(plain, lineages=(Lineage({**plain.lineages[0].stored, "duties": duties}),))


@given(st.lists(DUTY, max_size=6, unique=True))
def test_the_notice_carries_the_words_of_every_duty(duties: list[str]):
    text = notice(with_duties(duties), title="x")
    for duty in duties:
        assert " ".join(duty.partition(":")[2].split()) in text


@given(st.text(max_size=60))
def test_no_name_breaks_out_of_a_card(name: str):
    of = dataset("llama-3.1", name=name, creator=name, prompt_sources=(name,))
    card = dataset_card(of)
    head = head_of(card)
    assert head["pretty_name"] == name
    assert head["license"] == "other"
    assert sum(line == "## Files" for line in card.splitlines()) == 1


@pytest.mark.parametrize(
    ("rows", "word"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (2 * 10**9, "1B<n<10B")]
)
def test_sizes_are_the_hubs_words(rows: int, word: str):
    assert size_category(rows) == word

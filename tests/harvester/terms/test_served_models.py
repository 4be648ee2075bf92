"""Test records of models that people serve themselves: which record applies, and the gate's verdict."""

from __future__ import annotations

from datetime import date

import pytest

from harvester.terms.gate import RecordedTerms, allows
from harvester.terms.records import load_registry

SHIPPED = load_registry()
TODAY = date(2026, 11, 28)
PERMITTED = (
    *("Qwen3-Next-80B-A3B-Instruct", "Qwen3-Coder-30B-A3B-Instruct", "Qwen3-Coder-480B-A35B-Instruct-FP8"),
    *("Qwen2.5-Coder-7B-Instruct", "Qwen2.5-Coder-32B-Instruct-AWQ", "QwQ-32B", "smollm2:135m"),
    *("SmolLM2-135M-Instruct", "SmolLM3-3B", "OLMo-2-1124-7B-Instruct", "Olmo-3-7B-Instruct"),
    *(
        "granite-3.3-8b-instruct",
        "granite-4.0-h-small",
        "Mistral-7B-Instruct-v0.3",
        "Mixtral-8x7B-Instruct-v0.1",
    ),
    *("Mixtral-8x22B-Instruct-v0.1", "Mistral-Nemo-Instruct-2407", "Mistral-Small-3.2-24B-Instruct-2506"),
    *("Mistral-Small-24B-Instruct-2501", "Ministral-3-8B-Instruct-2512", "DeepSeek-V3-0324", "DeepSeek-V3.1"),
    *(
        "DeepSeek-V3.2-Exp",
        "DeepSeek-R1-Distill-Qwen-7B",
        "DeepSeek-R1-0528-Qwen3-8B",
        "GLM-4.5-Air",
        "GLM-4.6",
    ),
    *("Kimi-K2-Instruct", "Kimi-K2-Thinking", "Yi-1.5-9B-Chat", "internlm3-8b-instruct", "zephyr-7b-beta"),
    *("TinyLlama-1.1B-Chat-v1.0", "Apertus-8B-Instruct-2509", "MiMo-7B-RL", "ERNIE-4.5-21B-A3B-PT"),
)
UNREAD = ("NVIDIA-Nemotron-Nano-12B-v2", "Falcon3-7B-Instruct", "LFM2-1.2B")
# The text of the licence was read, and that it applies to the model.
READ = ("NVIDIA-Nemotron-Nano-9B-v2", "nemotron-nano-9b-v2")
# Weights under other terms than their neighbours.
OTHERS = (
    *("Qwen2.5-Coder-3B-Instruct", "Ministral-8B-Instruct-2410", "DeepSeek-R1-Distill-Llama-8B", "Kimi-K2.6"),
    *("Mistral-Small-Instruct-2409", "DeepSeek-V3", "GLM-5.3"),
)


def record_of(model: str) -> str:
    (record,) = [
        record
        for record in SHIPPED.records.values()
        if record.layer == "weights" and record.applies_to_model(model)
    ]
    return record.id


def permitted(model: str, declared: str) -> bool:
    terms = RecordedTerms(SHIPPED, TODAY)
    return allows(
        terms, host="127.0.0.1", model=model, declared=declared, use="harvest", purpose="train"
    ).permitted


@pytest.mark.parametrize("model", [*PERMITTED, *READ])
def test_a_served_model_passes_the_gate_once_its_record_is_declared(model: str) -> None:
    assert permitted(model, record_of(model))
    assert not permitted(model, "")


@pytest.mark.parametrize("model", UNREAD)
def test_a_licence_whose_rule_for_outputs_was_not_read_stays_closed(model: str) -> None:
    assert not permitted(model, record_of(model))


@pytest.mark.parametrize("model", OTHERS)
def test_neighbours_under_other_terms_have_other_records_or_none(model: str) -> None:
    served = {"qwen2.5-coder-apache", "mistral-2023-2025-apache", "deepseek-r1-distill-qwen-mit"}
    served |= {"kimi-k2-modified-mit", "deepseek-v3-2025-mit", "glm-4.5-4.6-mit"}
    for record_id in served:
        assert not SHIPPED.records[record_id].applies_to_model(model)
        assert not permitted(model, record_id)


@pytest.mark.parametrize("model", ["SmolLM2-135M-Opus-Reasoning", "Mistral-7B-Uncensored-Merge"])
def test_a_derivative_of_a_served_model_needs_its_own_record(model: str) -> None:
    assert not permitted(model, record_of(model))


def test_no_reading_claims_a_text_that_was_not_read() -> None:
    ids = {record_of(model) for model in (*PERMITTED, *UNREAD)}
    assert all(SHIPPED.records[record_id].established != "primary" for record_id in ids)
    assert all(SHIPPED.records[record_of(model)].established == "primary" for model in READ)


def test_a_variant_of_a_read_model_stays_closed() -> None:
    variants = ("NVIDIA-Nemotron-Nano-9B-v2-Japanese", "NVIDIA-Nemotron-Nano-9B-v2-Distill")
    assert not any(permitted(model, record_of(READ[0])) for model in variants)

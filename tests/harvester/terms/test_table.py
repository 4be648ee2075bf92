"""Test that every row of the table of teachers is in the registry, with layer, verdict and dates."""

from __future__ import annotations

import tomllib
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from harvester.terms.records import load_registry

DATA = Path(__file__).resolve().parents[3] / "data"
SHIPPED = load_registry().records
READ, ACCOUNT, COMMON = "primary", "third_party", "general"
# record, layer, verdict, established, effective, seen; days are None where the table gives none.
TABLE = [
    ("deepseek-api-2026-04-29", "service", "permit", READ, "2026-04-29", "2026-08-22"),
    ("deepseek-app-2026-03-27", "service", "permit", READ, None, "2026-03-27"),
    ("deepseek-r1-v4-mit", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("deepseek-v2-v3-licence-1.0", "weights", "duties", ACCOUNT, None, "2026-10-05"),
    ("deepseek-r1-distill-llama", "weights", "duties", ACCOUNT, None, "2026-10-05"),
    ("qwen3.8-27b-apache", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("qwen-licence-2024", "weights", "duties", ACCOUNT, None, None),
    ("qwen-research-2024", "weights", "restrict", ACCOUNT, None, None),
    ("qwen-community-1.0", "weights", "unknown", ACCOUNT, None, "2026-10-05"),
    ("qwen-studio-2026-05-19", "service", "restrict", READ, None, "2026-05-19"),
    ("alibaba-model-studio-2026-08", "service", "restrict", ACCOUNT, None, "2026-08-02"),
    ("llama-2", "weights", "restrict", READ, None, None),
    ("llama-3", "weights", "restrict", READ, None, None),
    ("llama-3.1", "weights", "duties", READ, None, None),
    ("llama-3.2", "weights", "duties", ACCOUNT, None, None),
    ("llama-3.3", "weights", "duties", ACCOUNT, None, None),
    ("llama-4", "weights", "duties", ACCOUNT, None, "2026-10-05"),
    ("meta-model-api-preview", "service", "restrict", READ, None, "2026-08-21"),
    ("gemma-1-to-3", "weights", "duties", READ, None, None),
    ("gemma-4-apache", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("gemini-api-2026-03-23", "service", "restrict", ACCOUNT, "2026-03-23", "2026-10-05"),
    ("google-consumer-2026-07-30", "service", "restrict", READ, "2026-07-30", "2026-08-22"),
    ("mistral-apache", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("mistral-mrl-0.1", "weights", "restrict", READ, None, None),
    ("mistral-mnpl-0.1", "weights", "restrict", ACCOUNT, None, None),
    ("mistral-medium-3.5", "weights", "unknown", ACCOUNT, None, "2026-10-05"),
    ("mistral-api-2026-08-05", "service", "permit", READ, None, "2026-08-05"),
    ("gpt-oss-apache", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("openai-api-2026-01-01", "service", "restrict", READ, "2026-01-01", "2026-08-22"),
    ("anthropic-usage-policy-2025-09-15", "service", "restrict", READ, "2025-09-15", "2026-08-14"),
    ("anthropic-commercial-2025-06-17", "service", "restrict", READ, "2025-06-17", "2026-08-14"),
    ("xai-api-2026-08", "service", "restrict", READ, None, "2026-08-14"),
    ("cohere-api", "service", "unknown", ACCOUNT, None, None),
    ("cohere-cc-by-nc", "weights", "restrict", ACCOUNT, None, None),
    ("phi-mit", "weights", "permit", COMMON, None, None),
    ("nvidia-open-model-2025-10-24", "weights", "duties", ACCOUNT, "2025-10-24", None),
    ("nvidia-open-model-cosmos-2025-10-24", "weights", "duties", READ, "2025-10-24", None),
    ("nvidia-nemotron-open", "weights", "duties", ACCOUNT, None, None),
    ("kimi-k2.6-k3", "weights", "unknown", ACCOUNT, None, "2026-10-05"),
    ("kimi-service-2026-08", "service", "restrict", ACCOUNT, None, "2026-08-02"),
    ("glm-5-mit", "weights", "permit", ACCOUNT, None, "2026-10-05"),
    ("glm-5.3", "weights", "duties", ACCOUNT, None, "2026-10-05"),
    ("minimax-m3", "weights", "restrict", ACCOUNT, None, "2026-10-05"),
    ("tencent-hunyuan", "weights", "restrict", ACCOUNT, None, None),
    ("host-deepinfra-2026-08", "service", "permit", ACCOUNT, None, "2026-08-02"),
    ("host-fireworks-2026-08", "service", "permit", ACCOUNT, None, "2026-08-02"),
    ("host-together-2026-08", "service", "permit", ACCOUNT, None, "2026-08-02"),
    ("host-novita-2026-08", "service", "permit", ACCOUNT, None, "2026-08-02"),
    ("host-baidu-intl-2026-08", "service", "restrict", ACCOUNT, None, "2026-08-02"),
    ("openrouter-2026-08-31", "router", "permit", READ, None, None),
]
BEYOND = {"mock-teacher", "qwen3-apache", "qwen2.5-apache"}
"""Records the table does not have: our own mock, and common knowledge of older Apache sizes."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_row_of_the_table_is_a_record(row: tuple[str, str, str, str, str | None, str | None]):
    name, layer, verdict, established, effective, seen = row
    record = SHIPPED[name]
    assert (record.layer, record.verdict, record.established) == (layer, verdict, established)
    assert record.effective == (date.fromisoformat(effective) if effective else None)
    assert seen is None or record.seen == date.fromisoformat(seen)


def test_nothing_else_is_shipped_and_the_counts_are_right():
    served = tomllib.loads((DATA / "terms" / "weights-served.toml").read_text(encoding="utf-8"))["record"]
    names = {record["id"] for record in served}
    assert set(SHIPPED) == {row[0] for row in TABLE} | BEYOND | names
    assert Counter(record["established"] for record in served) == {READ: 1, ACCOUNT: 3, COMMON: 20}
    counts = Counter(record.established for name, record in SHIPPED.items() if name not in names)
    assert counts == {READ: 18, ACCOUNT: 32, COMMON: 3}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-2", {"student_line": "llama-2"}),
        ("llama-3", {"student_line": "llama-3"}),
        ("llama-3.1", {"duties": ("name_prefix:Llama", "display:Built with Llama")}),
        ("llama-4", {"duties": ("name_prefix:Llama", "display:Built with Llama")}),
        ("deepseek-r1-distill-llama", {"duties": ("name_prefix:Llama", "display:Built with Llama")}),
        ("qwen-licence-2024", {"duties": ("display:Improved using Qwen",)}),
        ("qwen-research-2024", {"duties": ("noncommercial",)}),
        ("cohere-cc-by-nc", {"duties": ("noncommercial",), "licence": "CC-BY-NC-4.0"}),
        ("mistral-mrl-0.1", {"duties": ("noncommercial",)}),
    ],
)
def test_conditions_of_the_table_are_duties_of_the_record(name: str, message: dict[str, object]):
    assert {field: getattr(SHIPPED[name], field) for field in message} == message


def test_gemma_passes_on_its_terms_and_notice():
    kinds = Counter(duty.partition(":")[0] for duty in SHIPPED["gemma-1-to-3"].duties)
    assert kinds == {"card_licence": 1, "pass_terms": 2, "notice": 1}

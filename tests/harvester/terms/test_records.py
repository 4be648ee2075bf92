"""Test the shipped records: each loads, cites its source, and decides its cases."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError
from harvester.terms import gate
from harvester.terms.manage import record_toml
from harvester.terms.records import parse
from tests.harvester.terms.judging import judge

DATA = Path(__file__).resolve().parents[3] / "data"
SHIPPED = gate.load_registry()
TODAY = date(2026, 11, 24)
ROW: Mapping[str, Any] = {
    "id": '"own"',
    "layer": '"weights"',
    "match": '{ host = "*", model = "own-*" }',
    "verdict": '"permit"',
    "gist": '"ours"',
    "url": '"https://example.com"',
    "licence": '"Apache-2.0"',
    "source": '"the text"',
    "established": '"primary"',
    "seen": "2026-11-01",
    "review_after": "2027-11-01",
}


def toml(**more: str) -> str:
    lines = [f"{name} = {value}" for name, value in {**ROW, **more}.items() if value]
    return "\n".join(["[[record]]", *lines, ""])


def harvest(host: str, model: str, declared: str = "", **more: Any) -> gate.Verdict:
    facts: dict[str, Any] = {"use": "harvest", "purpose": "train", "today": TODAY, **more}
    return judge(SHIPPED, host=host, model=model, declared=declared, **facts)


@pytest.mark.parametrize("record", SHIPPED.records.values(), ids=lambda r: r.id)
def test_each_row_cites_gist_address_source_and_days(record: gate.TermsRecord):
    assert len(record.gist) > 15
    assert record.url.startswith("https://")
    assert record.source
    assert date(2026, 1, 1) <= record.seen <= TODAY
    assert record.seen + timedelta(days=150) <= record.review_after
    if record.established != "primary":
        assert "second-hand" in record.citation()
        assert not record.evaluation
    if record.verdict == "duties":
        assert record.duties or record.conditions
    if record.layer == "weights":
        assert not record.covers_weights


def test_all_folders_rows_are_loaded():
    files = [tomllib.loads(path.read_text()) for path in (DATA / "terms").glob("*.toml")]
    assert sum(len(each["record"]) for each in files) == len(SHIPPED.records) >= 50
    assert {r.established for r in SHIPPED.records.values()} == {"primary", "third_party", "general"}


LOCAL = "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "model", "declared", "status"),
    [
        (LOCAL, "deepseek-ai/DeepSeek-R1-0528", "deepseek-r1-v4-mit", "permit"),
        (LOCAL, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-v4-mit", "unknown"),
        (LOCAL, "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "deepseek-r1-distill-llama", "duties"),
        (LOCAL, "Qwen/Qwen3.8-27B", "qwen3.8-27b-apache", "permit"),
        (LOCAL, "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-apache", "permit"),
        (LOCAL, "qwen2.5:7b", "qwen2.5-apache", "permit"),
        (LOCAL, "Qwen/Qwen2.5-72B-Instruct", "qwen2.5-apache", "unknown"),
        (LOCAL, "Qwen/Qwen2.5-72B-Instruct", "qwen-licence-2024", "duties"),
        (LOCAL, "Qwen/Qwen2.5-3B-Instruct", "qwen-research-2024", "restrict"),
        (LOCAL, "meta-llama/Llama-2-70b-chat-hf", "llama-2", "restrict"),
        (LOCAL, "meta-llama/Meta-Llama-3-8B-Instruct", "llama-3", "restrict"),
        (LOCAL, "meta-llama/Meta-Llama-3-8B-Instruct", "llama-3.1", "unknown"),
        (LOCAL, "meta-llama/Llama-3.1-8B-Instruct", "llama-3.1", "duties"),
        (LOCAL, "llama3.2:3b", "llama-3.2", "duties"),
        (LOCAL, "meta-llama/Llama-3.3-70B-Instruct", "llama-3.3", "duties"),
        (LOCAL, "meta-llama/Llama-4-Scout-17B-16E", "llama-4", "duties"),
        (LOCAL, "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", "nvidia-open-model-2025-10-24", "duties"),
        (LOCAL, "google/gemma-3-27b-it", "gemma-1-to-3", "duties"),
        (LOCAL, "google/gemma-4-27b-it", "gemma-4-apache", "permit"),
        (LOCAL, "openai/gpt-oss-20b", "gpt-oss-apache", "permit"),
        (LOCAL, "mistralai/Mistral-Large-Instruct-2411", "mistral-mrl-0.1", "restrict"),
        (LOCAL, "CohereLabs/aya-expanse-8b", "cohere-cc-by-nc", "restrict"),
        (LOCAL, "tencent/Hunyuan-A13B-Instruct", "tencent-hunyuan", "restrict"),
        (LOCAL, "moonshotai/Kimi-K3", "kimi-k2.6-k3", "unknown"),
        ("api.deepseek.com", "deepseek-chat", "", "permit"),
        ("api.mistral.ai", "mistral-small-latest", "", "permit"),
        ("api.openai.com", "gpt-5", "", "restrict"),
        ("api.anthropic.com", "claude-opus", "", "restrict"),
        ("api.x.ai", "grok-4", "", "restrict"),
        ("generativelanguage.googleapis.com", "gemini-3-pro", "", "restrict"),
        ("api.cohere.com", "command-a", "", "unknown"),
        ("dashscope-intl.aliyuncs.com", "qwen3-32b", "qwen3-apache", "restrict"),
        ("api.deepinfra.com", "openai/gpt-oss-120b", "gpt-oss-apache", "permit"),
        ("api.deepinfra.com", "openai/gpt-oss-120b", "", "unknown"),
        ("openrouter.ai", "openai/gpt-oss-120b", "gpt-oss-apache, host-deepinfra-2026-08", "permit"),
        ("openrouter.ai", "openai/gpt-oss-120b", "gpt-oss-apache", "unknown"),
        ("openrouter.ai", "openai/gpt-5", "openai-api-2026-01-01", "unknown"),
        ("api.example.com", "gpt-oss-120b", "gpt-oss-apache", "unknown"),
    ],
)
def test_cases_the_registry_is_there_for(host: str, model: str, declared: str, status: str):
    assert harvest(host, model, declared).status == status


def test_the_router_is_forced_to_distillable_models_of_the_declared_host():
    verdict = harvest("openrouter.ai", "openai/gpt-oss-120b", "gpt-oss-apache, host-deepinfra-2026-08")
    assert verdict.body["provider"] == {
        "enforce_distillable_text": True,
        "allow_fallbacks": False,
        "only": ["deepinfra"],
    }


def test_upstream_duties_are_united_with_the_publishers():
    verdict = harvest(LOCAL, "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF", "nvidia-open-model-2025-10-24")
    assert {"name_prefix:Llama", "display:Built with Llama", "display:Built on NVIDIA Nemotron"} <= set(
        verdict.duties
    )


@pytest.mark.parametrize("host", ["api.openai.com", "api.anthropic.com", "api.x.ai"])
def test_evaluation_stays_open_where_the_text_bars_training_only(host: str):
    assert harvest(host, "some-model", purpose="eval").permitted
    assert not harvest(host, "some-model", purpose="eval", use="train").permitted


def test_a_folder_overlays_records_of_the_same_id_and_adds_others(tmp_path: Path):
    tightened = replace(SHIPPED.records["llama-2"], verdict="unknown")
    (tmp_path / "own.toml").write_text(toml() + record_toml(tightened))
    registry = gate.load_registry(tmp_path / "missing", tmp_path)
    assert len(registry.records) == len(SHIPPED.records) + 1
    assert registry.records["llama-2"].verdict == "unknown"
    own = registry.records["own"]
    assert own.applies_to_host("127.0.0.1")
    assert own.applies_to_model("owner/Own-7B")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"verdict": '"maybe"'}, "verdict 'maybe'"),
        ({"layer": '"prompts"'}, "layer 'prompts'"),
        ({"established": '"rumour"'}, "established 'rumour'"),
        ({"gist": '""'}, "gist"),
        ({"gist": ""}, "gist"),
        ({"seen": '"2026-11-01"'}, "seen"),
        ({"seen": "2026-11-01T00:00:00"}, "seen"),
        ({"forced": "true"}, "unknown fields ['forced']"),
        ({"duties": '["dance"]'}, "unknown duty 'dance'"),
        ({"duties": '["same_line:gpt"]'}, "unknown duty 'same_line:gpt'"),
        ({"evaluation": '"yes"'}, "evaluation"),
        ({"mock": "true"}, "mock record"),
        ({"match": '{ host = ["127.0.0.1"], model = "*" }', "mock": "true"}, "mock record"),
        ({"match": '{ host = "*", model = [""] }'}, "model"),
    ],
)
def test_a_broken_record_is_named_with_file_and_field(more: dict[str, str], message: str):
    with pytest.raises(ConfigError) as caught:
        parse(toml(**more), "terms/own.toml")
    assert message in str(caught.value)
    assert "terms/own.toml: record 'own'" in str(caught.value)


@pytest.mark.parametrize("text", ["", "record = 3", "record = [3]", "[[record]\n", "[record]\nid = 'x'"])
def test_a_file_that_is_no_registry_is_refused(tmp_path: Path, text: str):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"own\.toml"):
        gate.load_registry(tmp_path)


def test_an_id_written_twice_in_one_folder_is_refused(tmp_path: Path):
    (tmp_path / "a.toml").write_text(toml())
    (tmp_path / "b.toml").write_text(toml())
    with pytest.raises(ConfigError, match="two records"):
        gate.load_registry(tmp_path)

"""Test ways around the gate: overlays, spellings, prefixes, clocks, edited permissions."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config import config
from harvester.errors import ConfigError, TermsRefused
from harvester.system.hosts import check_url, is_plain, plain_host
from harvester.terms import gate
from harvester.terms.lineage import Lineage
from harvester.terms.manage import record_toml, state
from harvester.terms.permissions import Permission, as_toml, load_permissions, record_permission
from harvester.terms.records import Registry, TermsRecord, load_registry
from tests.harvester.terms.judging import judge

TODAY = date(2026, 11, 24)
SHIPPED = load_registry()
OPENAI = SHIPPED.records["openai-api-2026-01-01"]


def ask(registry: Registry, host: str, model: str, declared: str = "", **more: Any) -> gate.Verdict:
    facts: dict[str, Any] = {"use": "harvest", "purpose": "train", "today": TODAY, **more}
    return judge(registry, host=host, model=model, declared=declared, **facts)


def overlaid(folder: Path, *records: TermsRecord) -> Registry:
    folder.mkdir(exist_ok=True)
    (folder / "own.toml").write_text("".join(record_toml(each) for each in records), encoding="utf-8")
    return load_registry(folder)


# overlays


@pytest.mark.parametrize(
    ("record", "change"),
    [
        ("openai-api-2026-01-01", {"verdict": "permit"}),
        ("openai-api-2026-01-01", {"verdict": "duties", "conditions": ("be good",)}),
        ("openai-api-2026-01-01", {"host": ("api.elsewhere.com",)}),
        ("openai-api-2026-01-01", {"model": ("gpt-1",)}),
        ("openai-api-2026-01-01", {"except_model": ("gpt-5*",)}),
        ("openai-api-2026-01-01", {"layer": "router"}),
        ("openai-api-2026-01-01", {"superseded_by": "none-such"}),
        ("alibaba-model-studio-2026-08", {"evaluation": True}),
        ("host-deepinfra-2026-08", {"covers_weights": True}),
        ("llama-3.1", {"duties": ("display:Built with Llama",)}),
        ("llama-3.1", {"conditions": ()}),
        ("llama-3.1", {"verdict": "permit"}),
        ("llama-2", {"student_line": "llama-3"}),
        ("minimax-m3", {"duties": ("display:Built with MiniMax M3",)}),
    ],
)
def test_a_folder_cannot_loosen_what_was_read(tmp_path: Path, record: str, change: dict[str, Any]):
    with pytest.raises(TermsRefused, match="loosens a reading") as caught:
        overlaid(tmp_path / "terms", replace(SHIPPED.records[record], **change))
    assert caught.value.exit_code == 77
    assert SHIPPED.records[record].gist in caught.value.message
    assert "terms record" in caught.value.remedy


def test_a_restriction_is_not_superseded_by_a_kinder_record(tmp_path: Path):
    kinder = replace(OPENAI, id="openai-new", verdict="permit")
    with pytest.raises(TermsRefused, match="restrict becomes permit"):
        overlaid(tmp_path / "terms", kinder, replace(OPENAI, superseded_by="openai-new"))
    equal = replace(OPENAI, id="openai-new", seen=TODAY)
    assert overlaid(tmp_path / "terms", equal, replace(OPENAI, superseded_by="openai-new"))


def test_a_kinder_record_beside_a_restriction_changes_nothing(tmp_path: Path):
    registry = overlaid(tmp_path / "terms", replace(OPENAI, id="kind", verdict="permit"))
    assert ask(registry, "api.openai.com", "gpt-5", "kind").status == "restrict"


def test_a_folder_may_tighten_renew_and_fill_in(tmp_path: Path):
    registry = overlaid(
        tmp_path / "terms",
        replace(SHIPPED.records["host-together-2026-08"], verdict="restrict"),
        replace(OPENAI, seen=TODAY, review_after=TODAY + timedelta(days=100)),
        replace(SHIPPED.records["cohere-api"], verdict="permit", seen=TODAY, established="primary"),
    )
    assert ask(registry, "api.together.xyz", "Qwen/Qwen3-8B", "qwen3-apache").status == "restrict"
    assert registry.records[OPENAI.id].seen == TODAY
    assert ask(registry, "api.cohere.com", "command-z").permitted


def test_a_server_on_this_machine_does_not_decide_the_terms_of_its_weights(tmp_path: Path):
    mine = replace(OPENAI, id="mine", host=("127.0.0.1", "localhost", "::1"), verdict="permit")
    registry = overlaid(tmp_path / "terms", mine)
    for host in mine.host:
        assert ask(registry, host, "whatever-7b", "mine").status == "unknown"


def test_a_record_of_weights_names_its_models(tmp_path: Path):
    for pattern in ("*", "?*", "*-*"):
        with pytest.raises(ConfigError, match="name its models"):
            overlaid(tmp_path / "terms", replace(SHIPPED.records["phi-mit"], id="all", model=(pattern,)))


# names of models


@pytest.mark.parametrize(
    ("model", "declared"),
    [
        ("Qwen3-8B-Opus-Reasoning", "qwen3-apache"),
        ("someone/qwen3-8b-gpt5-sft", "qwen3-apache"),
        ("qwen3-8b-claude", "qwen3-apache"),
        ("phi-4-uncensored", "phi-mit"),
        ("gpt-oss-20b-hermes", "gpt-oss-apache"),
        ("meta-llama/Llama-3.1-8B-Instruct-gpt4o", "llama-3.1"),
        ("mock-teacher/gpt-5", "mock-teacher"),
        ("mock-teacher-gpt5", "mock-teacher"),
        ("qwen3-8b/gpt-5", "qwen3-apache"),
        ("gpt-5", "mock-teacher"),
    ],
)
def test_a_permitted_prefix_makes_no_permitted_model(model: str, declared: str):
    assert ask(SHIPPED, "127.0.0.1", model, declared).status == "unknown"


@pytest.mark.parametrize(
    ("model", "declared"),
    [
        ("Qwen/Qwen3-8B-Instruct-AWQ", "qwen3-apache"),
        ("unsloth/Qwen3-30B-A3B-Thinking-2507-GGUF", "qwen3-apache"),
        ("qwen2.5:7b-instruct-q4_K_M", "qwen2.5-apache"),
        ("/models/Qwen3-8B-Q5_K_M.gguf", "qwen3-apache"),
        ("RedHatAI/gemma-4-31b-it-FP8-dynamic", "gemma-4-apache"),
        ("microsoft/phi-4-mini-instruct", "phi-mit"),
        ("openai/gpt-oss-120b:free", "gpt-oss-apache"),
        ("neuralmagic/Meta-Llama-3.1-70B-Instruct-quantized.w4a16", "llama-3.1"),
        ("deepseek-ai/DeepSeek-R1-0528", "deepseek-r1-v4-mit"),
    ],
)
def test_packing_weights_otherwise_leaves_their_terms(model: str, declared: str):
    assert ask(SHIPPED, "127.0.0.1", model, declared).permitted


# spellings of hosts


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com./v1",
        "https://api\u3002openai\u3002com/v1",
        "https://ａｐｉ.openai.com/v1",
        "https://api.openaı.com/v1",
        "https://api%2Eopenai.com/v1",
        "https://api.openai.com\\@127.0.0.1/v1",
        "https://127.0.0.1@api.openai.com/v1",
        "https://@api.openai.com/v1",
        "https://api.open\tai.com/v1",
        "https://api.openai.com/v1?",
        "https://api.openai.com/v1#",
        "https://api..openai.com/v1",
        "https://-api.openai.com/v1",
        "https://[0:0:0:0:0:0:0:1]/v1",
        "https://[::ffff:127.0.0.1]@x/v1",
        "http://127.0.0.1.evil.com/v1",
        "http://127.1/v1",
        "http://0x7f.0.0.1/v1",
        "http://2130706433/v1",
        "http://[::ffff:127.0.0.1]/v1",
        "http://localhost./v1",
        "https://api.openai.com:99999/v1",
    ],
)
def test_a_host_is_written_plainly_or_not_at_all(url: str):
    for name in ("base_url", "replicas"):
        facts: dict[str, Any] = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
        facts[name] = [url] if name == "replicas" else url
        with pytest.raises(ConfigError):
            config.parse({"teacher": facts, "prompts": {"files": ["a"]}}, place="harvest.toml")


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("HTTPS://API.OpenAI.com/v1/", "https://api.openai.com/v1"),
        ("http://LOCALHOST:8000/v1", "http://localhost:8000/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://127.0.0.1:/v1", "http://127.0.0.1/v1"),
    ],
)
def test_one_host_has_one_spelling(url: str, clean: str):
    assert check_url(url) == clean


HOSTS = sorted({host for r in SHIPPED.records.values() for host in r.host if "*" not in host})


@given(st.sampled_from(HOSTS), st.data())
def test_no_case_or_last_dot_hides_a_host_from_its_record(host: str, data: st.DataObject):
    cases = data.draw(st.lists(st.booleans(), min_size=len(host), max_size=len(host)))
    spelt = "".join(c.upper() if up else c for c, up in zip(host, cases, strict=True))
    spelt += data.draw(st.sampled_from(["", "."]))
    plain = [r.id for r in SHIPPED.records.values() if r.applies_to_host(host)]
    assert [r.id for r in SHIPPED.records.values() if r.applies_to_host(spelt)] == plain
    assert plain_host(spelt) == host
    assert is_plain(spelt) == (spelt == host)


# clocks


def test_a_reading_from_the_future_is_none():
    before = OPENAI.seen - timedelta(days=1)
    qwen = SHIPPED.records["qwen3-apache"]
    early = qwen.seen - timedelta(days=1)
    assert ask(SHIPPED, "127.0.0.1", "qwen3-8b", qwen.id, today=early).status == "unknown"
    assert state(OPENAI, before) == "expired"


def test_no_reading_holds_longer_than_a_year_and_ninety_days():
    boastful = replace(SHIPPED.records["qwen3-apache"], review_after=date(2099, 1, 1))
    registry = Registry({boastful.id: boastful})
    last = boastful.seen + timedelta(days=366 + 90)
    assert ask(registry, "127.0.0.1", "qwen3-8b", boastful.id, today=last).permitted
    assert not ask(registry, "127.0.0.1", "qwen3-8b", boastful.id, today=last + timedelta(days=1)).permitted
    assert state(boastful, last + timedelta(days=1)) == "expired"


# permissions

GRANT = Permission(
    id="order-17",
    granted_by="OpenAI",
    basis="order-form",
    scope="training of internal models",
    host="api.openai.com",
    model="gpt-5*",
    evidence="folder 17",
    granted_on=date(2026, 6, 1),
    expires=date(2026, 12, 31),
    recorded_by="A. Operator",
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('model = "gpt-5*"', 'model = "*"'),
        ("expires = 2026-12-31", "expires = 2036-12-31"),
        ("granted_on = 2026-06-01", "granted_on = 2020-06-01"),
        ('scope = "training', 'scope = "Training'),
        ("api.openai.com", "api.anthropic.com"),
        ('checksum = "', 'checksum = "0'),
    ],
)
def test_an_edited_permission_is_none(tmp_path: Path, old: str, new: str):
    path = record_permission(tmp_path, GRANT, isatty=True)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match="edited by hand"):
        load_permissions(tmp_path)


def test_a_permission_written_by_a_script_is_none(tmp_path: Path):
    lines = [line for line in as_toml(GRANT).splitlines() if not line.startswith("checksum")]
    (tmp_path / "order-17.toml").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match="terms record"):
        load_permissions(tmp_path)


def test_a_comment_in_a_permission_breaks_the_rows_that_lean_on_it(tmp_path: Path):
    path = record_permission(tmp_path, GRANT, isatty=True)
    (before,) = load_permissions(tmp_path)
    path.write_text(path.read_text() + "# a word more\n")
    (after,) = load_permissions(tmp_path)
    lineage = {
        "run_id": "r",
        "teacher_id": "t",
        "host": "api.openai.com",
        "model": "gpt-5",
        "purpose": "train",
        "terms_id": OPENAI.id,
        "permission_sha256": before.sha256,
        "duties": [],
        "mock": False,
    }

    def verdict(permission: Permission) -> gate.Verdict:
        terms = gate.RecordedTerms(SHIPPED, TODAY, (permission,))
        return gate.allows_lineage(terms, Lineage(lineage), use="train")

    assert verdict(before).permitted
    assert not verdict(after).permitted
    assert "rely on permission" in json.dumps(verdict(after).reasons)

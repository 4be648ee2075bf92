"""harvest.toml: what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from harvester import config
from harvester.errors import ConfigError

GOOD = {"teacher": {"base_url": "http://127.0.0.1:8000/v1/", "model": "m"}, "prompts": {"files": ["a.jsonl"]}}


def changed(**tables: dict[str, object]) -> dict[str, object]:
    return {name: {**GOOD.get(name, {}), **tables.get(name, {})} for name in {**GOOD, **tables}}


def test_a_minimal_file_gets_defaults_and_a_clean_url():
    read = config.parse(GOOD, place="x")
    assert read.teacher.base_url == "http://127.0.0.1:8000/v1"
    assert read.teacher.identity == "http://127.0.0.1:8000/v1|m"
    assert (read.sampling.samples, read.run.max_failed, read.store.path) == (1, 0, "store")


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"teacher": {"modle": "x"}}, "did you mean 'model'?"),
        ({"sampling": {"temprature": 1}}, "did you mean 'temperature'?"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        ({"teacher": {"base_url": "http://example.com/v1"}}, "plain http is for loopback only"),
        ({"teacher": {"base_url": "https://user:pw@example.com/v1"}}, "no user, password"),
        ({"teacher": {"base_url": "https://example.com/v1?key=sk-1"}}, "no user, password, query"),
        ({"teacher": {"base_url": "ftp://example.com"}}, "is not an http(s) URL"),
        ({"teacher": {"replicas": ["http://example.com/v1"]}}, "plain http is for loopback only"),
        ({"teacher": {"api_key_env": "sk-abcdef"}}, "the NAME of an environment variable"),
        ({"teacher": {"api_key_env": ["ONE", "TWO"]}}, "no key pools"),
        ({"teacher": {"api_keys": ["ONE", "TWO"]}}, "no key pools"),
        ({"teacher": {"proxies": ["http://127.0.0.1:1"]}}, "no proxy rotation"),
        ({"teacher": {"user_agent": "Mozilla/5.0"}}, "no disguise"),
        ({"teacher": {"api_key": "sk-1"}}, "never the key itself"),
        ({"run": {"ignore_terms": True}}, "no override"),
        ({"sampling": {"extra": {"model": "gpt-5"}}}, "[teacher] model alone"),
        ({"sampling": {"extra": {"models": ["gpt-5"], "route": "fallback"}}}, "models, route"),
        ({"budget": {"usd": 1}}, "needs a [teacher.price]"),
        ({"prompts": {"files": []}}, "prompts.files"),
        ({"sampling": {"top_logprobs": 21}}, "top_logprobs"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(tables: dict[str, dict[str, object]], said: str):
    with pytest.raises(ConfigError) as caught:
        config.parse(changed(**tables), place="harvest.toml")
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert "harvest.toml" in caught.value.place


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("# one\n[teacher\n")
    with pytest.raises(ConfigError, match=r"a\.toml:2: not readable as TOML"):
        config.load(tmp_path / "a.toml")


def test_the_key_is_read_from_the_environment_by_name_only(monkeypatch: pytest.MonkeyPatch):
    teacher = config.parse(changed(teacher={"api_key_env": "MY_KEY"}), place="x").teacher
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        config.api_key(teacher)
    monkeypatch.setenv("MY_KEY", "canary-value")
    assert config.api_key(teacher) == "canary-value"
    assert "canary-value" not in repr(teacher) + teacher.model_dump_json()


@pytest.mark.parametrize("value", ["key-one,key-two", "one two", "key\u2019", "key\nX-Evil: 1", "one;two"])
def test_a_variable_holds_one_plain_key(monkeypatch: pytest.MonkeyPatch, value: str):
    teacher = config.parse(changed(teacher={"api_key_env": "MY_KEY"}), place="x").teacher
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="one credential per teacher") as caught:
        config.api_key(teacher)
    assert value not in str(caught.value)


def test_a_key_pasted_where_its_name_belongs_is_not_shown():
    teacher = config.parse(changed(teacher={"api_key_env": "aB3dCanary9xYz"}), place="x").teacher
    with pytest.raises(ConfigError, match="is not set") as caught:
        config.api_key(teacher)
    assert "Canary" not in str(caught.value)


def test_values_are_frozen_and_hashed():
    one, two = config.parse(GOOD, place="x"), config.parse(changed(sampling={"temperature": 0.5}), place="y")
    assert one.sha256 != two.sha256
    assert one.sha256 == config.parse(GOOD, place="z").sha256
    with pytest.raises(ValueError, match="frozen"):
        one.teacher.model = "other"  # type: ignore[misc]

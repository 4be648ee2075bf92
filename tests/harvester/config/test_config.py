"""Test which values of harvest.toml are refused, and with which message."""

from __future__ import annotations

import math
import tomllib
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from harvester.cli.init_config import HARVEST_TOML
from harvester.config import config, teacher_section
from harvester.errors import ConfigError

EAST, WEST = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))
GOOD = {"teacher": {"base_url": "http://127.0.0.1:8000/v1/", "model": "m"}, "prompts": {"files": ["a.jsonl"]}}


def changed(**tables: dict[str, object]) -> dict[str, object]:
    return {name: {**GOOD.get(name, {}), **tables.get(name, {})} for name in {**GOOD, **tables}}


def test_a_minimal_file_gets_defaults_and_a_clean_url():
    read = config.parse(GOOD, place="x")
    assert read.teacher.base_url == "http://127.0.0.1:8000/v1"
    assert read.teacher.teacher_id == "http://127.0.0.1:8000/v1|m"
    assert (read.sampling.samples, read.run.max_failed, read.store.path) == (1, 0, "store")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"teacher": {"modle": "x"}}, "did you mean 'model'?"),
        ({"sampling": {"temprature": 1}}, "did you mean 'temperature'?"),
        ({"sampling": {"temprature": 1}}, "other fields of the request body go into [sampling.extra]"),
        ({"sampling": {"max_completion_tokens": 9}}, "[sampling.extra] max_completion_tokens = ..."),
        ({"sampling": {"top_k": 9}}, "[sampling.extra] top_k = ..."),
        ({"sampling": {"chat_template_kwargs": {}}}, "[sampling.extra] chat_template_kwargs = ..."),
        ({"sampling": {"frequency_penalties": 1}}, "[sampling.extra]"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature"),
        (
            {"teacher": {"base_url": "http://example.com/v1"}},
            "plain http is for private addresses",
        ),
        ({"teacher": {"base_url": "https://user:pw@example.com/v1"}}, "no user, password"),
        ({"teacher": {"base_url": "https://example.com/v1?key=sk-1"}}, "no user, password, query"),
        (
            {"teacher": {"base_url": "https://example.com/v1/chat/completions"}},
            "which each request adds: https://example.com/v1",
        ),
        ({"teacher": {"base_url": "http://vllm:8000/V1/Completions/"}}, "adds: http://vllm:8000/V1"),
        ({"teacher": {"base_url": "ftp://example.com"}}, "is not an http(s) URL"),
        (
            {"teacher": {"replicas": ["http://example.com/v1"]}},
            "plain http is for private addresses",
        ),
        ({"store": {"read_also": ["s3://bucket/x"]}}, "this needs a store on this machine"),
        ({"teacher": {"api_key_env": "sk-abcdef"}}, "the NAME of an environment variable"),
        ({"teacher": {"api_key_env": ["ONE", "TWO"]}}, "no key pools"),
        ({"teacher": {"api_keys": ["ONE", "TWO"]}}, "no key pools"),
        ({"teacher": {"proxies": ["http://127.0.0.1:1"]}}, "no proxy rotation"),
        ({"teacher": {"user_agent": "Mozilla/5.0"}}, "no disguise"),
        ({"teacher": {"api_key": "sk-1"}}, "never the key itself"),
        ({"run": {"ignore_terms": True}}, "no override"),
        ({"sampling": {"extra": {"model": "gpt-5"}}}, "[teacher] model alone"),
        ({"sampling": {"extra": {"models": ["gpt-5"], "route": "fallback"}}}, "models, route"),
        ({"sampling": {"extra": {"temperature": 1}}}, "'temperature' has a key of its own"),
        ({"sampling": {"max_tokens": True}}, "must be a number, not true"),
        ({"sampling": {"temperature": False}}, "must be a number, not false"),
        ({"run": {"patience_s": "5"}}, "must be a number, without quotes, not '5'"),
        ({"prompts": {"files": ["a\0b"]}}, "must not hold a null character"),
        ({"sampling": {"stream": "yes"}}, "must be true or false, without quotes"),
        ({"sampling": {"stream": 1}}, "must be true or false"),
        ({"teacher": {"price": {"input": True, "output": 1}}}, "teacher.price.input: must be a number"),
        ({"budget": {"usd": 1}}, "needs a [teacher.price]"),
        ({"prompts": {"files": []}}, "prompts.files"),
        ({"sampling": {"top_logprobs": 21}}, "top_logprobs"),
        ({"teacher": {"max_concurency": 4}}, "did you mean 'teacher.limits.max_concurrency'?"),
        ({"teacher": {"grace_s": 4}}, "did you mean 'run.grace_s'?"),
        ({"limits": {"max_concurrency": 4}}, "did you mean 'teacher.limits'?"),
        ({"prompts": {"colour": "red"}}, "known here: files, system, max_bad"),
        ({"budget": {"usd": math.inf}}, "budget.usd"),
        ({"budget": {"usd": 1e308}}, "budget.usd"),
        ({"budget": {"tokens": 10**30}}, "budget.tokens"),
        ({"teacher": {"price": {"input": math.inf, "output": 1}}}, "teacher.price.input"),
        ({"teacher": {"price": {"input": 1, "output": 1e300}}}, "teacher.price.output"),
        ({"teacher": {"limits": {"requests_per_minute": math.inf}}}, "limits.requests_per_minute"),
        ({"teacher": {"limits": {"max_concurrency": 10**20}}}, "limits.max_concurrency"),
        ({"store": {"shard_mib": math.inf}}, "store.shard_mib"),
        ({"store": {"min_free_mib": math.nan}}, "store.min_free_mib"),
        ({"run": {"grace_s": math.inf}}, "run.grace_s"),
        ({"run": {"patience_s": 1e300}}, "run.patience_s"),
        ({"run": {"epoch": 2**53}}, "run.epoch"),
        ({"sampling": {"samples": 10**23}}, "sampling.samples"),
        ({"sampling": {"presence_penalty": math.nan}}, "sampling.presence_penalty"),
        ({"schedule": {"finish_by": datetime(1, 1, 1, tzinfo=EAST)}}, "between 1970 and 9999"),
        ({"schedule": {"finish_by": datetime(9999, 12, 31, 23, tzinfo=WEST)}}, "between 1970 and 9999"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(tables: dict[str, dict[str, object]], message: str):
    with pytest.raises(ConfigError) as caught:
        config.parse(changed(**tables), place="harvest.toml")
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    assert "harvest.toml" in caught.value.place


def test_missing_and_broken_files(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        config.load(tmp_path / "none.toml")
    (tmp_path / "a.toml").write_text("# one\n[teacher\n")
    with pytest.raises(ConfigError, match=r"a\.toml:2: not readable as TOML"):
        config.load(tmp_path / "a.toml")
    for text in (f"a = {'1' * 5000}", f"a = {'[' * 3000}{']' * 3000}"):
        (tmp_path / "a.toml").write_text(text)
        with pytest.raises(ConfigError, match=r"a\.toml: not readable as TOML"):
            config.load(tmp_path / "a.toml")


def test_the_key_is_read_from_the_environment_by_name_only(monkeypatch: pytest.MonkeyPatch):
    teacher = config.parse(changed(teacher={"api_key_env": "MY_KEY"}), place="x").teacher
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(ConfigError, match="MY_KEY is not set"):
        teacher_section.api_key(teacher)
    monkeypatch.setenv("MY_KEY", "canary-value")
    assert teacher_section.api_key(teacher) == "canary-value"
    assert "canary-value" not in repr(teacher) + teacher.model_dump_json()


@pytest.mark.parametrize("value", ["key-one,key-two", "one two", "key\u2019", "key\nX-Evil: 1", "one;two"])
def test_a_variable_holds_one_plain_key(monkeypatch: pytest.MonkeyPatch, value: str):
    teacher = config.parse(changed(teacher={"api_key_env": "MY_KEY"}), place="x").teacher
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="one credential per teacher") as caught:
        teacher_section.api_key(teacher)
    assert value not in str(caught.value)


def test_a_key_pasted_where_its_name_belongs_is_not_shown():
    teacher = config.parse(changed(teacher={"api_key_env": "aB3dCanary9xYz"}), place="x").teacher
    with pytest.raises(ConfigError, match="is not set") as caught:
        teacher_section.api_key(teacher)
    assert "Canary" not in str(caught.value)


def test_values_are_frozen_and_hashed():
    first, second = (
        config.parse(GOOD, place="x"),
        config.parse(changed(sampling={"temperature": 0.5}), place="y"),
    )
    assert first.sha256 != second.sha256
    assert first.sha256 == config.parse(GOOD, place="z").sha256
    with pytest.raises(ValueError, match="frozen"):
        first.teacher.model = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    "names", [["max_n", "samples"], ["max_n", "[verify.sum]", "kind", "[accept]", "per_prompt", "of"]]
)
def test_what_the_starter_mentions_is_right_as_it_stands(names: list[str]) -> None:
    lines = HARVEST_TOML.splitlines()
    mentioned = [line for line in lines if line.startswith(tuple(f"# {name} " for name in names))]
    assert len(mentioned) == len(names)
    text = "\n".join(line.removeprefix("# ") if line in mentioned else line for line in lines)
    starter = config.parse(tomllib.loads(text), place="starter")
    assert starter.most_samples > 1
    assert starter.teacher.max_n == 8

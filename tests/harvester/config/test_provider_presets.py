"""`[teacher] preset` fills what the file leaves out and changes no key; `harvester plan` says what it set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from harvester.api.request_builder import requests
from harvester.config import config
from harvester.config.provider_presets import load_presets
from harvester.errors import ConfigError
from harvester.prompts import reader
from harvester.terms import gate
from tests.harvester.terms.judging import judge
from tests.journey.run_process import harvester

NAMES = sorted(load_presets())
OPENAI = load_presets()["openai"]


def parse(teacher: Mapping[str, Any], **tables: Any) -> config.HarvestConfig:
    return config.parse(
        {"teacher": teacher, "prompts": {"files": ["a.jsonl"]}, **tables}, place="harvest.toml"
    )


def write(folder: Path, teacher: str) -> Path:
    (folder / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    path = folder / "harvest.toml"
    path.write_text(
        f'[teacher]\n{teacher}\n[prompts]\nfiles = ["a.jsonl"]\n[run]\npurpose = "eval"\n', encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_preset_is_a_whole_teacher_table(name: str):
    teacher = parse({"preset": name}).teacher
    assert (teacher.base_url, teacher.model) == (
        load_presets()[name]["base_url"],
        load_presets()[name]["model"],
    )
    assert {"base_url", "model", "terms"} <= set(teacher.preset_values)


@pytest.mark.parametrize("name", NAMES)
def test_the_terms_records_of_every_shipped_preset_apply_to_its_model(name: str):
    teacher = parse({"preset": name}).teacher
    permitted = [
        judge(
            gate.load_registry(),
            host=urlsplit(teacher.base_url).hostname or "",
            model=teacher.model,
            declared=teacher.terms,
            use="harvest",
            purpose=purpose,
            today=datetime(2026, 11, 24, tzinfo=UTC).date(),
        ).permitted
        for purpose in ("train", "eval")
    ]
    assert permitted == [name != "openai", True]


def test_a_preset_fills_address_key_terms_and_a_dated_price():
    teacher = parse({"preset": "openai"}).teacher
    assert teacher.base_url == OPENAI["base_url"]
    assert teacher.api_key_env == "OPENAI_API_KEY"
    assert teacher.price is not None
    assert (teacher.price.input, teacher.price.as_of) == (OPENAI["price"]["input"], OPENAI["price"]["as_of"])
    assert teacher.preset_values["price.as_of"] == OPENAI["price"]["as_of"].isoformat()


def test_what_the_file_sets_wins():
    teacher = parse({"preset": "openai", "api_key_env": "MINE", "price": {"input": 1, "output": 2}}).teacher
    assert teacher.api_key_env == "MINE"
    assert teacher.price is not None
    assert (teacher.price.input, teacher.price.as_of) == (1, None)
    values = {key for key in teacher.preset_values if not key.startswith("batch.")}
    assert values == {"base_url", "model", "terms", "max_n"}


def test_limits_are_filled_one_by_one():
    limits = parse({"preset": "ollama", "limits": {"requests_per_minute": 30}}).teacher.limits
    assert limits.requests_per_minute == 30
    assert limits.max_concurrency == load_presets()["ollama"]["limits"]["max_concurrency"]
    assert parse({"preset": "ollama", "limits": {"max_concurrency": 9}}).teacher.limits.max_concurrency == 9


def test_terms_and_price_belong_to_the_presets_own_model():
    teacher = parse({"preset": "openai", "model": "another"}).teacher
    assert (teacher.terms, teacher.price) == ("", None)
    assert teacher.api_key_env == "OPENAI_API_KEY"


def test_a_key_is_not_sent_to_another_address():
    teacher = parse({"preset": "openai", "base_url": "https://gateway.example.com/v1"}).teacher
    assert (teacher.api_key_env, teacher.terms, teacher.price) == (None, "", None)
    same = parse({"preset": "openai", "base_url": f"{OPENAI['base_url']}/"}).teacher
    assert same.api_key_env == "OPENAI_API_KEY"


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_hashes_are_those_of_a_table_written_by_hand(tmp_path: Path, name: str):
    by_preset, by_hand = parse({"preset": name}), parse(load_presets()[name])
    assert by_preset.model_dump_json() == by_hand.model_dump_json()
    assert by_preset.sha256 == by_hand.sha256
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n', encoding="utf-8")
    keys = [
        [request.key for request in requests(reader.read(["a.jsonl"], tmp_path), chosen)]
        for chosen in (by_preset, by_hand)
    ]
    assert keys[0] == keys[1] != []


def test_an_unknown_preset_names_the_known_ones(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'openai'") as caught:
        parse({"preset": "opnai", "model": "m"})
    assert all(name in caught.value.message for name in NAMES)
    done = harvester("plan", write(tmp_path, 'preset = "opnai"'))
    assert done.returncode == 2
    assert "opnai" in done.stderr
    assert "'openai'" in done.stderr
    with pytest.raises(ConfigError, match=r"teacher\.preset"):
        parse({"preset": 3})


def test_without_a_preset_the_address_is_still_required():
    with pytest.raises(ConfigError, match=r"teacher\.base_url"):
        parse({"model": "m"})
    with pytest.raises(ConfigError, match="did you mean 'preset'"):
        parse({"presett": "openai"})


def test_plan_says_which_values_came_from_the_preset(tmp_path: Path):
    path = write(tmp_path, 'preset = "openai"\nmodel = "gpt-5-mini"')
    done = harvester("plan", path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("preset")]
    for part in ("openai", OPENAI["base_url"], "OPENAI_API_KEY", "0.25", "2026-06-15"):
        assert part in line
    assert "model" not in line
    plan = json.loads(harvester("plan", path, "--json").stdout)
    assert (plan["preset"], plan["preset_values"]["base_url"]) == ("openai", OPENAI["base_url"])
    assert plan["high_usd"] is not None


def test_plan_of_a_file_without_a_preset_has_no_such_line(tmp_path: Path):
    done = harvester("plan", write(tmp_path, 'base_url = "http://127.0.0.1:9/v1"\nmodel = "mock-teacher"'))
    assert not any(line.startswith("preset") for line in done.stdout.splitlines())


def test_the_schema_for_editors_knows_presets():
    import jsonschema

    schema = json.loads(harvester("config", "schema").stdout)
    assert "preset" in schema["$defs"]["TeacherSection"]["properties"]

    def is_valid(teacher: Mapping[str, Any]) -> bool:
        return jsonschema.Draft202012Validator(schema).is_valid(
            {"teacher": teacher, "prompts": {"files": ["a.jsonl"]}}
        )

    assert is_valid({"preset": "openai"})
    assert is_valid({"base_url": "http://127.0.0.1:1/v1", "model": "m"})
    assert not is_valid({"model": "m"})
    assert not is_valid({"base_url": "http://127.0.0.1:1/v1"})

"""Test templates that write prompts, and rows that hold settings of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from harvester.api.request_builder import input_tokens_of, requests
from harvester.config.config import HarvestConfig
from harvester.errors import ConfigError, PromptError
from harvester.mock_teacher.running import RunningMock
from harvester.prompts import reader
from harvester.prompts.row_rules import RowRules, rules_of
from harvester.prompts.template import PromptTemplate
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder

TEMPLATE = "What is {{ a }} + {{ row['the other'] }}?\n"


def config(sampling: dict[str, Any] | None = None, **prompts: object) -> HarvestConfig:
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    return HarvestConfig.model_validate(
        {"teacher": teacher, "prompts": {"files": ["a.*"], **prompts}, "sampling": sampling or {}}
    )


def sent(row: dict[str, Any], chosen: HarvestConfig, root: Path = Path()) -> list[dict[str, Any]]:
    prompt = reader.to_prompt(row, file="a.jsonl", line=3, rules=rules_of(chosen.prompts, root))
    return [dict(request.body) for request in requests([prompt], chosen)]


@pytest.fixture
def template(tmp_path: Path) -> PromptTemplate:
    (tmp_path / "sum.j2").write_text(TEMPLATE)
    return PromptTemplate.load(tmp_path / "sum.j2")


def test_a_template_writes_the_prompt_from_all_fields_of_the_row(template: PromptTemplate) -> None:
    row = {"a": 3, "the other": 4, "prompt": "kept", "id": "s"}
    prompt = reader.to_prompt(row, file="a.jsonl", line=1, rules=RowRules(template=template))
    assert prompt.messages == ({"role": "user", "content": "What is 3 + 4?"},)
    assert prompt.metadata == {"a": 3, "the other": 4, "prompt": "kept"}
    assert prompt.id == "s"


def test_a_template_can_allow_for_a_field_that_is_null(tmp_path: Path) -> None:
    (tmp_path / "t.j2").write_text("Say {{ a or '' }}{% if a is none %}nothing{% endif %}")
    assert PromptTemplate.load(tmp_path / "t.j2").render({"a": None}, "a.jsonl:1") == "Say nothing"


@pytest.mark.parametrize(
    ("text", "row", "what"),
    [
        (TEMPLATE, {"a": 3}, "'dict object' has no attribute 'the other'"),
        ("{{ question }}", {"a": 3}, "'question' is undefined"),
        ("{{ a }}", {"a": None, "b": 1}, "the field 'a', which is null"),
        ("{{ a.b }}", {"a": {"b": None}}, "a value that is null"),
        ("{{ a / 0 }}", {"a": 3}, "ZeroDivisionError"),
        ("{{ a.__class__.__mro__ }}", {"a": 3}, "unsafe"),
        ("{% include 'b.j2' %}", {"a": 3}, "no loader"),
        (" {# nothing #} ", {"a": 3}, "writes no text"),
        ("{{ a.append(1) }}", {"a": [3]}, "unsafe|not safely callable"),
    ],
)
def test_a_row_that_a_template_can_not_use_names_row_and_cause(
    tmp_path: Path, text: str, row: dict[str, Any], what: str
) -> None:
    (tmp_path / "t.j2").write_text(text)
    rules = RowRules(template=PromptTemplate.load(tmp_path / "t.j2"))
    with pytest.raises(PromptError, match=what) as caught:
        reader.to_prompt(row, file="a.jsonl", line=7, rules=rules)
    assert caught.value.place == "a.jsonl:7"
    assert "t.j2" in caught.value.message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "does not exist"),
        (b"\xff\xfe", "not UTF-8"),
        (b"fine\n{% if %}", "no jinja2 template"),
        (b"x" * ((1 << 20) + 1), "more than 1,048,576 bytes"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "t.j2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=what) as caught:
        rules_of(config(template="t.j2").prompts, tmp_path)
    assert "t.j2" in str(caught.value)


def test_settings_of_a_row_replace_those_of_the_configuration_when_they_are_listed() -> None:
    row = {"prompt": "p", "temperature": "0.25", "max_tokens": 7, "stop": ["\n"], "seed": None}
    sampling = {"temperature": 1.0, "max_tokens": 500}
    (plain,) = sent(row, config(sampling))
    assert (plain["temperature"], plain["max_tokens"], "stop" in plain) == (1.0, 500, False)
    listed = config(sampling, row_settings=["temperature", "max_tokens", "stop", "seed"])
    (own,) = sent(row, listed)
    assert (own["temperature"], own["max_tokens"], own["stop"]) == (0.25, 7, ["\n"])
    assert "seed" not in own
    (other,) = sent({"prompt": "p"}, listed)
    assert (other["temperature"], other["max_tokens"]) == (1.0, 500)


def test_the_budget_reserves_what_a_row_may_use_and_settings_are_no_input() -> None:
    chosen = config({"max_tokens": 500}, row_settings=["max_tokens"])
    rules = rules_of(chosen.prompts, Path())
    small, large, plain = (
        reader.to_prompt({"prompt": "p", **own}, file="a", line=1, rules=rules)
        for own in ({"max_tokens": 7}, {"max_tokens": 9000}, {})
    )
    outputs = [request.budget_output_tokens for request in requests([small, large, plain], chosen)]
    assert outputs == [7, 9000, 500]
    counted = {input_tokens_of(prompt, chosen) for prompt in (small, large, plain)}
    assert counted == {request.input_tokens for request in requests([small, large, plain], chosen)}
    assert len(counted) == 1


def test_each_sample_of_a_row_with_a_seed_has_a_seed_of_its_own() -> None:
    chosen = config({"samples": 3, "seed": 100}, row_settings=["seed"])
    assert [body["seed"] for body in sent({"prompt": "p", "seed": 7}, chosen)] == [7, 8, 9]
    assert [body["seed"] for body in sent({"prompt": "p"}, chosen)] == [100, 101, 102]
    (body,) = sent({"prompt": "p", "seed": 7}, config({"seed": 100}, row_settings=["seed"]))
    assert body["seed"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "hot"), ("max_tokens", 0), ("top_p", 2.0), ("stop", 3)],
)
def test_a_setting_that_sampling_would_refuse_is_refused_in_a_row(name: str, value: object) -> None:
    with pytest.raises(PromptError, match=name) as caught:
        sent({"prompt": "p", name: value}, config(row_settings=[name]))
    assert caught.value.place == "a.jsonl:3"


def test_a_harvest_with_template_and_settings(
    tmp_path: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    """The rows are asked as the template writes them, once; another template asks them again."""
    mock = mock_teacher(accuracy=1.0)
    path = write_folder(tmp_path, mock.base_url, 1)
    rows = [{"a": n, "the other": 2, "temperature": n / 10} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = '[prompts]\ntemplate = "sum.j2"\nrow_settings = ["temperature"]\n'
    path.write_text(path.read_text().replace("[prompts]\n", settings))
    missing = harvester("plan", path)
    assert (missing.returncode, "sum.j2" in missing.stderr) == (2, True)
    (tmp_path / "sum.j2").write_text(TEMPLATE)
    plan = harvester("plan", path)
    assert "prompt    What is 0 + 2?" in plan.stdout, plan.stderr
    assert harvester("run", path).returncode == 0
    corpus = Corpus.open(tmp_path / "store")
    samples = sorted(corpus.samples(), key=lambda sample: sample.prompt_id)
    assert {s.messages[0]["content"]: s.completion for s in samples} == {
        f"What is {n} + 2?": str(n + 2) for n in range(4)
    }
    assert sorted(orjson.loads(s.request_json)["temperature"] for s in samples) == [0, 0.1, 0.2, 0.3]
    (lineage,) = corpus.lineages()
    assert lineage.stored["template_sha256"] == PromptTemplate.load(tmp_path / "sum.j2").sha256
    assert mock.state()["received"] == 4
    assert harvester("run", path).returncode == 0
    assert mock.state()["received"] == 4
    (tmp_path / "sum.j2").write_text("What is 1 + {{ a }}?")
    assert harvester("run", path).returncode == 0
    assert mock.state()["received"] == 8

"""Answers that are not the requested JSON are recognised, and no schema is ever fetched."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.replies.completion import parse
from harvester.api.response_format import check, matches
from harvester.api.types import Outcome
from harvester.errors import ConfigError

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}


def response_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}


@pytest.mark.parametrize(
    ("text", "is_fit"),
    [
        ('{"sum": 7}', True),
        ('{"sum": 7.5}', False),
        ('{"sum": 7, "x": 1}', False),
        ("{}", False),
        ("seven", False),
        ("", False),
        ('```json\n{"sum": 7}\n```', False),
        ("[" * 5000, False),
        ("NaN", False),
    ],
)
def test_by_schema(text: str, is_fit: bool) -> None:
    assert matches(text, response_format(SCHEMA)) is is_fit


def test_any_object_will_do_without_a_schema() -> None:
    assert matches('{"a": 1}', {"type": "json_object"})
    assert not matches("[1]", {"type": "json_object"})
    assert matches("prose", {"type": "text"})
    assert matches("prose", None)


def test_a_reference_to_elsewhere_is_never_fetched() -> None:
    assert not matches('{"a": 1}', response_format({"$ref": "http://127.0.0.1:9/schema.json"}))
    local = {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    assert matches('{"a": 1}', response_format(local))
    assert not matches('{"a": "b"}', response_format(local))


def test_an_invalid_schema_is_refused_before_anything_is_sent() -> None:
    check(response_format(SCHEMA))
    check(None)
    check({"type": "json_object"})
    with pytest.raises(ConfigError, match="properties/a/type"):
        check(response_format({"properties": {"a": {"type": "whole"}}}))


@pytest.mark.parametrize(
    ("content", "finish", "outcome"),
    [
        ('{"sum": 1}', "stop", Outcome.OK),
        ("one", "stop", Outcome.INVALID),
        ("one", "length", Outcome.TRUNCATED),
    ],
)
def test_only_a_finished_answer_can_be_invalid(content: str, finish: str, outcome: Outcome) -> None:
    body = orjson.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}]})
    assert parse(body, response_format=response_format(SCHEMA)).outcome is outcome


@given(st.text())
def test_no_text_crashes(text: str) -> None:
    matches(text, response_format(SCHEMA))


def test_a_reference_that_leads_nowhere_is_refused_before_any_answer_is_paid() -> None:
    fine = {"$defs": {"a": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/a"}}}
    check(response_format(fine))
    check(response_format({"properties": {"x": {"$ref": "#"}}}))
    check(response_format({"$defs": {"a": {"$id": "a.json"}}, "$ref": "a.json"}))
    check(response_format({"properties": {"x": {"$ref": "http://json-schema.org/draft-07/schema#"}}}))
    for name in ("const", "default"):
        check(response_format({"properties": {"x": {name: {"$ref": "#/of/the/answer"}}}}))
    for name in ("enum", "examples"):
        check(response_format({"properties": {"x": {name: [{"$ref": "#/of/the/answer"}]}}}))
    for reference in ("#/$defs/b", "#/nope", "http://127.0.0.1:9/x.json", "other.json", "#/$defs/a/0/%zz"):
        with pytest.raises(ConfigError, match="leads nowhere"):
            check(response_format({**fine, "$ref": reference}))

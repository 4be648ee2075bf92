"""Bodies are parsed tolerantly, but one without a completion is never an answer."""

from __future__ import annotations

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.api.replies.completion import estimate_tokens, flag_unasked_tool_call, parse
from harvester.api.types import Outcome
from harvester.errors import BrokenAnswer, RateLimited, TeacherError, TeacherRefused, TeacherUnavailable


def body(message: dict[str, Any], finish: str | None = "stop", **more: Any) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more})


@pytest.mark.parametrize(
    ("message", "finish", "outcome"),
    [
        ({"content": "4"}, "stop", Outcome.OK),
        ({"content": "4"}, "length", Outcome.TRUNCATED),
        ({"content": None}, "length", Outcome.TRUNCATED),
        ({"content": ""}, "content_filter", Outcome.FILTERED),
        ({"content": None, "refusal": "No."}, "stop", Outcome.REFUSED),
        ({"content": None, "tool_calls": [{"id": "a"}]}, "tool_calls", Outcome.TOOL_CALL),
        ({"content": None}, "stop", Outcome.EMPTY),
        ({"content": ""}, "stop", Outcome.EMPTY),
        ({"content": "4"}, "because", Outcome.UNKNOWN),
        ({"content": "4"}, None, Outcome.UNKNOWN),
    ],
)
def test_outcome(message: dict[str, Any], finish: str | None, outcome: Outcome) -> None:
    assert parse(body(message, finish)).outcome is outcome


def test_reported_usage_and_identity() -> None:
    usage = {
        "prompt_tokens": 12,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    parsed = parse(body({"content": "4"}, usage=usage, model="m", id="r", system_fingerprint="f"))
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (12, 3)
    assert (parsed.usage.cached_tokens, parsed.usage.reasoning_tokens, parsed.usage.source) == (
        8,
        2,
        "reported",
    )
    assert (parsed.model, parsed.response_id, parsed.system_fingerprint) == ("m", "r", "f")


@pytest.mark.parametrize(
    "usage",
    [None, {}, "3", {"prompt_tokens": -1, "completion_tokens": 10**18}, {"prompt_tokens": True}],
)
def test_unusable_usage_is_estimated_and_says_so(usage: Any) -> None:
    parsed = parse(body({"content": "four"}, usage=usage), input_tokens=7)
    assert parsed.usage.source == "estimated"
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (7, estimate_tokens(4))


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        # Gemini leaves reasoning out of both counts, and only the total has it.
        ({"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 518}, (12, 506)),
        # xAI names it, beside the output tokens; so do servers that send no total.
        (
            {
                "prompt_tokens": 12,
                "completion_tokens": 600,
                "total_tokens": 1112,
                "completion_tokens_details": {"reasoning_tokens": 500},
            },
            (12, 1100),
        ),
        (
            {
                "prompt_tokens": 12,
                "completion_tokens": 6,
                "completion_tokens_details": {"reasoning_tokens": 500},
            },
            (12, 506),
        ),
        # Anthropic leaves its cache out of the input tokens.
        (
            {
                "input_tokens": 2000,
                "output_tokens": 6,
                "cache_read_input_tokens": 1000,
                "cache_creation_input_tokens": 300,
            },
            (3300, 6),
        ),
        ({"prompt_tokens": 12, "completion_tokens": 6, "cache_read_input_tokens": 1000}, (1012, 6)),
        (
            {
                "prompt_tokens": 2000,
                "completion_tokens": 6,
                "total_tokens": 3006,
                "cache_read_input_tokens": 1000,
            },
            (3000, 6),
        ),
        # Bedrock has its cache in the total alone, at the price of input.
        (
            {"inputTokens": 10, "outputTokens": 6, "cacheReadInputTokens": 5000, "totalTokens": 5016},
            (5010, 6),
        ),
        (
            {"inputTokens": 10, "outputTokens": 6, "cacheWriteInputTokens": 300, "totalTokens": 316},
            (310, 6),
        ),
        # Protobuf leaves a 0 out: Gemini's answer was cut in its reasoning.
        ({"promptTokenCount": 12, "thoughtsTokenCount": 500, "totalTokenCount": 512}, (12, 500)),
        # Nothing is beside these.
        ({"prompt_tokens": 1300, "completion_tokens": 6, "cache_read_input_tokens": 1000}, (1300, 6)),
        ({"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 18}, (12, 6)),
        ({"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 9}, (12, 6)),
        ({"prompt_tokens": 12, "completion_tokens": 6, "total_tokens": 10**15}, (12, 6)),
        ({"prompt_tokens": "12", "completion_tokens": "6", "total_tokens": "18"}, (12, 6)),
    ],
    ids=range(14),
)
def test_what_is_counted_beside_prompt_and_answer_is_billed(
    usage: dict[str, Any], counts: tuple[int, int]
) -> None:
    parsed = parse(body({"content": "four"}, usage=usage), input_tokens=7)
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == counts
    assert parsed.usage.source == "reported"


@pytest.mark.parametrize("place", ["choice", "x_groq"])
def test_counts_in_a_choice_or_beside_it_are_found(place: str) -> None:
    usage = {"prompt_tokens": 12, "completion_tokens": 6}
    choice: dict[str, Any] = {"index": 0, "delta": {"content": "four"}, "finish_reason": "stop"}
    chunk: dict[str, Any] = {"choices": [choice]}
    (choice if place == "choice" else chunk).update(
        {"usage": usage} if place == "choice" else {"x_groq": {"usage": usage}}
    )
    parsed = parse(b"data: " + orjson.dumps(chunk) + b"\n\ndata: [DONE]\n\n")
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (12, 6)


def test_content_parts_reasoning_and_tools() -> None:
    parsed = parse(
        body(
            {
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "reasoning_content": "because",
                "tool_calls": [{"id": "1"}],
            }
        )
    )
    assert (parsed.text, parsed.reasoning, parsed.tool_calls_json) == ("ab", "because", '[{"id":"1"}]')


def test_logprobs_keep_exact_bytes() -> None:
    split = "é".encode()
    token = {
        "token": "\\xc3",
        "bytes": [split[0]],
        "logprob": -0.5,
        "top_logprobs": [{"token": "e", "logprob": -1, "bytes": None}, {"token": 3}, "junk"],
    }
    raw = orjson.dumps(
        {
            "choices": [
                {"message": {"content": "x"}, "logprobs": {"content": [token, None]}, "finish_reason": ""}
            ]
        }
    )
    only, unreadable = parse(raw).logprobs
    assert (unreadable.token, unreadable.logprob) == ("", None)
    assert (only.data, only.logprob) == (split[:1], -0.5)
    assert [(alternative.token, alternative.data, alternative.logprob) for alternative in only.top] == [
        ("e", None, -1.0)
    ]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"<html>",
        b"[]",
        b"7",
        b"{}",
        b'{"choices":null}',
        b'{"choices":[]}',
        b'{"choices":[1]}',
        b'{"choices":[{}]}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"choices":NaN}',
        body({"content": ""}, "error"),
        body({"content": "half"}, "network_error"),
    ],
)
def test_no_completion_is_an_error_with_the_raw_bytes(raw: bytes) -> None:
    with pytest.raises(BrokenAnswer) as caught:
        parse(raw)
    assert caught.value.raw == raw
    assert not caught.value.is_permanent


def test_a_byte_order_mark_is_ignored() -> None:
    assert parse(b"\xef\xbb\xbf" + body({"content": "4"})).text == "4"


def test_usage_without_choices_may_be_billed() -> None:
    with pytest.raises(BrokenAnswer) as caught:
        parse(b'{"choices":[],"usage":{"prompt_tokens":1}}')
    assert caught.value.maybe_billed


@pytest.mark.parametrize(
    ("error", "leaf"),
    [
        ({"code": 429, "message": "slow"}, RateLimited),
        ({"code": 502}, TeacherUnavailable),
        ({"code": "401"}, TeacherRefused),
        ({"type": "rate_limit_error"}, RateLimited),
        ({"type": "insufficient_quota", "code": "insufficient_quota"}, TeacherRefused),
        ("it broke", BrokenAnswer),
        ({"message": "it broke"}, BrokenAnswer),
    ],
)
def test_an_error_inside_a_200_counts_as_its_status(error: Any, leaf: type[TeacherError]) -> None:
    with pytest.raises(leaf):
        parse(orjson.dumps({"error": error}))


def test_an_error_inside_a_200_is_not_shown_as_the_status_of_the_reply() -> None:
    with pytest.raises(TeacherUnavailable, match="status 200 that means HTTP 502"):
        parse(orjson.dumps({"error": {"code": 502, "message": "upstream"}}))


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({}, "invalid"),
        ({"tools": []}, "invalid"),
        ({"tool_choice": "none"}, "invalid"),
        ({"tools": [{"type": "function"}]}, "tool_call"),
        ({"functions": [{"name": "f"}]}, "tool_call"),
    ],
)
@pytest.mark.parametrize("message", [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}])
def test_a_tool_call_is_usable_only_if_tools_were_offered(
    body: dict[str, Any], message: dict[str, Any], outcome: str
) -> None:
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    parsed = parse(orjson.dumps({"choices": [choice]}))
    assert flag_unasked_tool_call(parsed, body).outcome == outcome


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=120)
@given(message=_JSON, finish=_JSON, usage=_JSON, logprobs=_JSON, error=_JSON)
def test_no_body_crashes_the_parser(message: Any, finish: Any, usage: Any, logprobs: Any, error: Any) -> None:
    choice = {"message": message, "finish_reason": finish, "logprobs": logprobs}
    for document in ({"choices": [choice], "usage": usage, "error": error}, {"error": error}, message):
        with contextlib.suppress(TeacherError):
            assert parse(orjson.dumps(document)).usage.output_tokens >= 0

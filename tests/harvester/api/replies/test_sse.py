"""A streamed answer equals an unstreamed one, and one that was cut off is never complete."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.http.client import Client
from harvester.api.replies.completion import parse
from harvester.api.request_builder import requests
from harvester.api.types import Completion, Outcome, Prompt, RawAnswer
from harvester.config.config import HarvestConfig
from harvester.errors import ConnectionBroken, RateLimited, TeacherError
from harvester.mock_teacher.running import RunningMock

Mock = Callable[..., RunningMock]


def ask(mock: RunningMock, **sampling: Any) -> RawAnswer:
    chosen = HarvestConfig.model_validate(
        {
            "teacher": {"base_url": mock.base_url, "model": "mock-teacher"},
            "prompts": {"files": ["p"]},
            "sampling": {"max_tokens": 64, "seed": 1, **sampling},
        }
    )

    async def go() -> RawAnswer:
        async with Client(chosen.teacher, chosen.run, None) as client:
            request = next(requests([Prompt("p", ({"role": "user", "content": "What is 2 + 3?"},))], chosen))
            return await client.send(request, chosen.teacher.base_url)

    return asyncio.run(go())


def comparable(entry: Completion) -> tuple[Any, ...]:
    return (
        entry.text or None,
        entry.outcome,
        entry.finish_reason,
        entry.usage,
        entry.model,
        entry.reasoning,
        entry.logprobs,
    )


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [{"action": "stream_comments"}],
        [{"action": "no_done"}],
        [{"action": "reasoning", "value": "carry the one"}],
        [{"action": "content_filter"}],
        [{"action": "bom"}],
    ],
    ids=lambda rows: rows[0]["action"] if rows else "plain",
)
def test_a_stream_equals_the_unstreamed_body(mock_teacher: Mock, faults: list[dict[str, Any]]) -> None:
    mock = mock_teacher(faults=faults)
    complete = parse(ask(mock, top_logprobs=2).body)
    streamed = ask(mock, top_logprobs=2, stream=True)
    assert b"data:" in streamed.body
    assert comparable(parse(streamed.body)) == comparable(complete)


def test_tool_calls_and_refusals_arrive_through_a_stream(mock_teacher: Mock) -> None:
    mock = mock_teacher(faults=[{"action": "tool_call"}])
    parsed = parse(ask(mock, stream=True).body)
    assert parsed.outcome is Outcome.TOOL_CALL
    assert "look_up" in (parsed.tool_calls_json or "")


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"action": "stream_cut", "events": 2}, ConnectionBroken),
        ({"action": "stream_error", "events": 2, "code": "rate_limit_exceeded"}, RateLimited),
    ],
    ids=lambda part: part["action"] if isinstance(part, dict) else "",
)
def test_a_damaged_stream_is_an_error(mock_teacher: Mock, fault: dict[str, Any], kind: type) -> None:
    mock = mock_teacher(faults=[fault])
    with pytest.raises(kind) as caught:
        parse(ask(mock, stream=True).body)
    assert sum(mock.fired().values()) == 1
    assert caught.value.maybe_billed


@pytest.mark.parametrize(
    ("code", "status"), [("overloaded_error", 529), ("rate_limit_exceeded", 429), (502, 502)]
)
def test_an_error_in_a_stream_says_that_it_was_an_event(
    mock_teacher: Mock, code: str | int, status: int
) -> None:
    fault = {"action": "stream_error", "events": 2, "code": code, "message": "come back later"}
    with pytest.raises(TeacherError) as caught:
        parse(ask(mock_teacher(faults=[fault]), stream=True).body)
    assert caught.value.status == status
    assert f"an error event in the stream that means HTTP {status}" in caught.value.message
    assert "come back later" in caught.value.message


def events(*chunks: Any, done: bool = True) -> bytes:
    lines = [b"data: " + orjson.dumps(chunk) for chunk in chunks] + [b"data: [DONE]"] * done
    return b"\n\n".join(lines) + b"\n\n"


PIECES = [
    {"id": "r", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "für "}}]},
    {"choices": [{"index": 0, "delta": {"content": "dich 漢"}, "finish_reason": None}]},
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
]


@given(st.data())
def test_a_stream_cut_before_its_finish_reason_is_no_answer(data: st.DataObject) -> None:
    raw = events(*PIECES)
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with contextlib.suppress(TeacherError):
        assert parse(cut).text == "für dich 漢"
        assert b'"finish_reason":"stop"' in cut


def test_a_junk_event_loses_nothing_else_but_the_answer_is_flagged(mock_teacher: Mock) -> None:
    mock = mock_teacher(faults=[{"action": "stream_junk", "events": 2}])
    parsed = parse(ask(mock, stream=True).body)
    assert sum(mock.fired().values()) == 1
    assert parsed.outcome is Outcome.UNKNOWN
    assert parsed.text == "5"


@given(st.binary(max_size=200))
def test_any_bytes_after_data_never_crash(junk: bytes) -> None:
    with contextlib.suppress(TeacherError):
        parse(b"data: " + junk)


def test_tool_call_arguments_in_pieces() -> None:
    def part(call: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}

    raw = events(
        part({"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}),
        part({"index": 0, "function": {"arguments": ":1}"}}),
        part({"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    )
    calls = orjson.loads(parse(raw).tool_calls_json or "")
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("f", '{"x":1}'),
        ("g", "{}"),
    ]


def _piece(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": None, **members}]}


_END = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
_DELTAS = [_piece(delta={"content": text}) for text in ("abc", "de", "a")]


@pytest.mark.parametrize(
    ("chunks", "outcome"),
    [
        # Pieces that no delta repeats, though their letters stand elsewhere in the text.
        ([*_DELTAS[:1], _piece(message={"content": "a"}), *_DELTAS[1:], _END], Outcome.UNKNOWN),
        ([*_DELTAS[:2], _piece(message={"content": "bc"}), *_DELTAS[2:], _END], Outcome.UNKNOWN),
        (
            [_piece(message={"content": [{"type": "text", "text": "a"}]}), *_DELTAS, _END],
            Outcome.UNKNOWN,
        ),
        # The whole message, all so far, or the same piece beside its delta.
        ([*_DELTAS, _piece(message={"content": "abcdea"}), _END], Outcome.OK),
        ([*_DELTAS[:1], _piece(message={"content": "abc"}), *_DELTAS[1:], _END], Outcome.OK),
        (
            [*_DELTAS[:1], _piece(delta={"content": "de"}, message={"content": "de"}), *_DELTAS[2:], _END],
            Outcome.OK,
        ),
        ([_piece(delta={"content": "abcdea"}), _piece(message={"role": "assistant"}), _END], Outcome.OK),
    ],
)
def test_a_message_beside_deltas_is_flagged_unless_it_repeats_them(
    chunks: list[dict[str, Any]], outcome: Outcome
) -> None:
    parsed = parse(events(*chunks))
    assert parsed.text == "abcdea"
    assert parsed.outcome is outcome


def test_a_paid_answer_with_odd_bytes_is_kept_and_flagged() -> None:
    content = orjson.dumps({"choices": [{"message": {"content": "a?b"}, "finish_reason": "stop"}]})
    for odd in (b"\\ud800", b"\xff"):
        parsed = parse(content.replace(b"?", odd))
        assert parsed.outcome is Outcome.UNKNOWN
        assert parsed.text is not None
        assert parsed.text.encode("utf-8").startswith(b"a")

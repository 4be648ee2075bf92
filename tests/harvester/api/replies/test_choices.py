"""Test how the answer to a request for several choices is split into bodies, and its bill into shares."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api import parse_in_child
from harvester.api.joining import idempotency_key, join, joined, may_join
from harvester.api.replies import completion
from harvester.api.replies.choices import Choices, split
from harvester.api.replies.usage import apportion
from harvester.api.request_builder import RequestBuilder
from harvester.api.types import Outcome, Prompt, Request
from harvester.config.config import parse
from harvester.config.teacher_section import PriceSection
from harvester.errors import BrokenAnswer, RateLimited, TeacherError

USAGE = {"prompt_tokens": 10, "completion_tokens": 9, "total_tokens": 19}


def choice(index: int | None, text: str, **changes: Any) -> dict[str, Any]:
    plain = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **changes}
    return plain if index is None else {"index": index, **plain}


def body(*choices: Any, usage: Any = USAGE, **changes: Any) -> bytes:
    document = {"id": "r1", "model": "m", "choices": choices, "usage": usage, **changes}
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def texts(parsed: Choices) -> list[str | None]:
    return [answer and answer.completion.text for answer in parsed.answers]


def counts(parsed: Choices) -> list[tuple[int, int]]:
    usages = [answer.completion.usage for answer in parsed.answers if answer is not None]
    return [(usage.input_tokens, usage.output_tokens) for usage in usages]


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**6), min_size=1, max_size=20))
def test_parts_add_up_and_none_is_off_by_more_than_one(total: int, weights: list[int]) -> None:
    parts = apportion(total, weights)
    assert sum(parts) == total
    whole = sum(weights) or len(weights)
    for part, weight in zip(parts, weights if any(weights) else [1] * len(weights), strict=True):
        assert abs(part * whole - total * weight) < whole


def test_largest_remainders_first_and_the_first_among_equals() -> None:
    assert apportion(10, [1, 1, 1, 1]) == [3, 3, 2, 2]
    assert apportion(7, [5, 3, 1]) == [4, 2, 1]
    assert apportion(2, [0, 0, 0]) == [1, 1, 0]


def test_each_choice_is_a_body_of_its_own() -> None:
    parsed = split(body(choice(2, "ccc"), choice(0, "a"), choice(1, "bb"), created=7), 3)
    assert texts(parsed) == ["a", "bb", "ccc"]
    assert counts(parsed) == [(4, 2), (3, 3), (3, 4)]
    for answer in parsed.answers:
        assert answer is not None
        assert completion.parse(answer.raw) == answer.completion
        document = json.loads(answer.raw)
        assert (document["id"], document["created"], len(document["choices"])) == ("r1", 7, 1)
        assert document["harvester_share"]["usage"] == USAGE


def test_many_choices_of_a_short_prompt_have_shares_of_nothing_and_keep_them() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    parsed = split(body(*(choice(at, "word word word word") for at in range(8)), usage=usage), 8, 3)
    assert [sum(column) for column in zip(*counts(parsed), strict=True)] == [
        parsed.usage.input_tokens,
        parsed.usage.output_tokens,
    ]
    assert (0, parsed.usage.output_tokens // 8) in counts(parsed)


@pytest.mark.parametrize(
    ("choices", "expected", "surplus"),
    [
        ([choice(None, "a"), choice(None, "b")], ["a", "b"], 0),
        ([choice(1, "b"), choice(0, "a"), choice(2, "c")], ["a", "b"], 1),
        ([choice(0, "a"), choice(0, "again")], ["a"], 1),
        ([choice(3, "b"), choice(1, "a")], ["a", "b"], 0),
        ([choice(0, "a")], ["a"], 0),
        (["a", "b"], ["a", "b"], 0),
    ],
)
def test_choices_of_two_that_were_asked_for(choices: list[Any], expected: list[str], surplus: int) -> None:
    parsed = split(body(*choices), 2)
    if not isinstance(choices[0], str):  # a bare text has no finish reason, so it is not understood
        assert {answer.completion.outcome for answer in parsed.answers if answer} == {Outcome.OK}
    assert (texts(parsed), parsed.surplus) == (expected, surplus)
    assert sum(tokens for _, tokens in counts(parsed)) == 9


def test_a_broken_choice_is_left_out_and_its_tokens_are_in_the_shares_of_the_others() -> None:
    parsed = split(body(choice(0, "a"), choice(1, "b", finish_reason="error"), choice(2, "c")), 3)
    assert texts(parsed) == ["a", None, "c"]
    assert counts(parsed) == [(5, 5), (5, 4)]


def test_an_error_in_one_choice_is_that_choices() -> None:
    failed = choice(1, "", error={"code": 502, "message": "upstream failed"}, finish_reason=None)
    assert texts(split(body(choice(0, "a"), failed), 2)) == ["a", None]


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (body(choice(0, "", finish_reason="error"), choice(1, "", finish_reason="error")), BrokenAnswer),
        (body(choices=None), BrokenAnswer),
        (body(error={"code": 429, "message": "rate limit"}, choices=None), RateLimited),
        (b"<html>", BrokenAnswer),
    ],
)
def test_an_answer_without_any_choice_is_the_error_it_always_was(
    raw: bytes, kind: type[TeacherError]
) -> None:
    with pytest.raises(kind):
        split(raw, 2)


def test_an_envelope_is_taken_off() -> None:
    inner = json.loads(body(choice(0, "a"), choice(1, "b")))
    parsed = split(json.dumps({"code": 0, "data": inner}).encode(), 2)
    assert texts(parsed) == ["a", "b"]
    assert {answer.completion.model for answer in parsed.answers if answer} == {"m"}


def test_log_probabilities_stay_with_their_choice() -> None:
    def listed(token: str) -> dict[str, Any]:
        return {"content": [{"token": token, "logprob": -0.5, "bytes": None, "top_logprobs": []}]}

    parsed = split(body(choice(0, "a", logprobs=listed("a")), choice(1, "b", logprobs=listed("b"))), 2)
    for answer, token in zip(parsed.answers, "ab", strict=True):
        assert answer is not None
        assert [entry.token for entry in completion.parse(answer.raw).logprobs] == [token]


def test_the_form_is_checked_choice_by_choice() -> None:
    form = {"type": "json_object"}
    parsed = split(body(choice(0, "{}"), choice(1, "no json")), 2, 0, form)
    assert [answer and answer.completion.outcome for answer in parsed.answers] == [
        Outcome.OK,
        Outcome.INVALID,
    ]


def event(*choices: Any, **head: Any) -> bytes:
    return b"data: " + json.dumps({"id": "r1", "choices": choices, **head}).encode() + b"\n\n"


def piece(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": text}, "finish_reason": finish}


def test_interleaved_choices_of_a_stream_are_told_apart() -> None:
    raw = event(piece(1, "b"), piece(0, "a")) + event(piece(0, "A", "stop")) + event(piece(1, "B", "length"))
    parsed = split(raw + event(usage=USAGE) + b"data: [DONE]\n\n", 2)
    assert texts(parsed) == ["aA", "bB"]
    assert [answer and answer.completion.outcome for answer in parsed.answers] == ["ok", "truncated"]
    assert parsed.usage.output_tokens == 9


def test_a_choice_that_a_cut_stream_did_not_end_is_left_out() -> None:
    raw = event(piece(0, "a", "stop")) + event(piece(1, "b"))
    assert texts(split(raw, 2)) == ["a", None]
    assert completion.is_complete(raw, 1)
    assert not completion.is_complete(raw, 2)
    assert completion.is_complete(raw + event(piece(1, "", "stop")), 2)


def test_a_choice_that_was_not_read_without_loss_is_never_ok_and_stays_so() -> None:
    raw = event({"index": 0, "delta": 7, "finish_reason": None}, piece(1, "b", "stop"))
    raw += event(piece(0, "a", "stop")) + b"data: [DONE]\n\n"
    parsed = split(raw, 2)
    assert [answer and answer.completion.outcome for answer in parsed.answers] == ["unknown", "ok"]
    assert parsed.answers[0] is not None
    assert completion.parse(parsed.answers[0].raw).outcome == "unknown"


def test_a_large_answer_is_split_in_a_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = body(choice(0, "a" * 20_000), choice(1, "b", finish_reason="error"), choice(2, "c"), choice(3, "d"))
    expected = split(raw, 3, 5)
    monkeypatch.setattr(parse_in_child, "NEVER_BYTES", 10_000)
    assert parse_in_child.is_heavy(raw)
    assert asyncio.run(parse_in_child.split(raw, 3, 5, None)) == expected
    with pytest.raises(BrokenAnswer):
        asyncio.run(parse_in_child.split(body(choice(0, "a" * 20_000, finish_reason="error")), 2, 5, None))


def requests_of(samples: int, **sampling: Any) -> list[Request]:
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "price": {"input": 3.0, "output": 7.0}}
    config = parse(
        {"teacher": teacher, "prompts": {"files": ["p"]}, "sampling": {"samples": samples, **sampling}},
        place="t",
    )
    prompt = Prompt("p", ({"role": "user", "content": "What is 1 + 2?"},))
    return list(RequestBuilder(config).build(prompt, range(samples)))


def test_a_joined_request_reserves_one_prompt_and_all_answers() -> None:
    rows = requests_of(3, max_tokens=100)
    price = PriceSection(input=3.0, output=7.0)
    request = join(rows, price)
    assert request.body == {**rows[0].body, "n": 3}
    assert (request.input_tokens, request.output_tokens) == (rows[0].input_tokens, 300)
    prompt_budget = rows[0].budget_tokens - 100
    assert (request.budget_tokens, request.budget_microusd) == (prompt_budget + 300, prompt_budget * 3 + 2100)
    assert request.key == rows[0].key
    assert (request.each, rows[0].each) == (tuple(rows), (rows[0],))
    assert idempotency_key(rows[0]) == rows[0].key.hex()
    assert len({idempotency_key(each) for each in (request, rows[0], join(rows[:2], price))}) == 3


def test_what_is_joined() -> None:
    rows = requests_of(5)
    assert [len(request.each) for request in joined(rows, 2, None)] == [2, 2, 1]
    assert [len(request.each) for request in joined(rows + requests_of(2), 8, None)] == [5, 2]
    seeded = requests_of(2, seed=1)
    assert not may_join(*seeded)
    assert [len(request.each) for request in joined(seeded, 8, None)] == [1, 1]


def test_counts_of_each_choice_are_not_taken_for_the_whole_bill() -> None:
    counted = [
        choice(index, "four", usage={"prompt_tokens": 10, "completion_tokens": tokens})
        for index, tokens in enumerate((40, 30))
    ]
    chunks = [{"choices": [{**each, "delta": each.pop("message")}]} for each in map(dict, counted)]
    streamed = b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks)
    for raw in (body(*counted, usage=None), streamed + b"data: [DONE]\n\n"):
        assert split(raw, 2, 10).usage.source == "estimated"

"""Test the mock teacher's answers: OpenAI's shapes, determinism, and mistakes that are known."""

from __future__ import annotations

import hashlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher import tokens
from harvester.mock_teacher.logprobs import token_logprobs
from harvester.mock_teacher.tasks.rules import solve
from tests.raw_client import Caller, body_of, once

SUMS = [f"What is {a} + {b}?" for a in range(10, 30) for b in range(10, 30)]


@given(st.text())
def test_tokens_join_to_the_text_and_cutting_them_is_stable(text):
    pieces = tokens.split(text)
    assert "".join(pieces) == text
    assert len(pieces) == tokens.count(text)
    for end in range(len(pieces)):
        assert tokens.split("".join(pieces[:end])) == pieces[:end]


@given(st.lists(st.text(min_size=1), max_size=5), st.integers(0, 20), st.binary(min_size=32, max_size=32))
def test_logprobs_are_a_falling_distribution_led_by_the_chosen_token(pieces, top, digest):
    entries = token_logprobs(pieces, top, digest)
    assert entries == token_logprobs(pieces, top, digest)
    assert b"".join(bytes(token["bytes"]) for token in entries) == "".join(pieces).encode()
    for token in entries:
        listed = token["top_logprobs"]
        assert len(listed) == top
        assert len({item["token"] for item in listed}) == top
        assert [item["logprob"] for item in listed] == sorted(
            (item["logprob"] for item in listed), reverse=True
        )
        assert sum(math.exp(item["logprob"]) for item in listed) < 1
        if top:
            assert (listed[0]["token"], listed[0]["logprob"]) == (token["token"], token["logprob"])


def test_the_shape_of_a_completion(mock_teacher):
    mock = mock_teacher(accuracy=1.0)
    reply = once(mock.base_url, "What is 12 + 30?", logprobs=True, top_logprobs=3)
    body = reply.json()
    assert reply.headers["content-type"] == "application/json"
    assert body["object"] == "chat.completion"
    assert body["model"] == "mock-teacher"
    assert body["id"].startswith("chatcmpl-")
    assert body["system_fingerprint"].startswith("mock-")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "42", "refusal": None}
    assert choice["finish_reason"] == "stop"
    entries = choice["logprobs"]["content"]
    assert len(entries) == body["usage"]["completion_tokens"]
    assert [len(token["top_logprobs"]) for token in entries] == [3] * len(entries)
    assert (
        body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    )


def test_an_unknown_prompt_gets_a_polite_sentence(mock_teacher):
    assert once(mock_teacher().base_url, "Who are you?").text() == "I do not know this task."


def test_content_parts_and_earlier_turns_leave_the_last_user_message_to_answer(mock_teacher):
    mock = mock_teacher(accuracy=1.0)
    messages = [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "What is 12 + 30?"}]},
    ]
    with Caller(mock.base_url) as caller:
        assert caller.send({"model": "mock-teacher", "messages": messages}).text() == "42"


def test_max_tokens_cuts_and_says_so(mock_teacher):
    mock = mock_teacher()
    for field in ("max_tokens", "max_completion_tokens"):
        body = once(mock.base_url, "Who are you?", **{field: 3}).json()
        assert body["choices"][0]["message"]["content"] == "I do not"
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 3


def test_a_stop_sequence_is_not_part_of_the_answer(mock_teacher):
    reply = once(mock_teacher().base_url, "Who are you?", stop=[" this", "."])
    assert reply.text() == "I do not know"
    assert reply.json()["choices"][0]["finish_reason"] == "stop"


def test_a_stream_says_what_a_whole_reply_says(mock_teacher):
    mock = mock_teacher(accuracy=1.0)
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2}
    complete = once(mock.base_url, "What is 12 + 30?", **fields).json()
    reply = once(
        mock.base_url, "What is 12 + 30?", stream=True, stream_options={"include_usage": True}, **fields
    )
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = reply.events()
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == complete["usage"]
    for index, choice in enumerate(complete["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(item["delta"].get("content", "") for item in mine) == choice["message"]["content"]
        assert [
            entry for item in mine if item["logprobs"] for entry in item["logprobs"]["content"]
        ] == choice["logprobs"]["content"]
        assert [item["finish_reason"] for item in mine if item["finish_reason"]] == [choice["finish_reason"]]
    entries = mock.ledger()["entries"]
    assert entries[0]["body_sha256"] == entries[1]["body_sha256"]
    plain = once(mock.base_url, "What is 12 + 30?", stream=True).events()
    assert all("usage" not in chunk for chunk in plain[:-1])


def answers(mock, prompts, **fields):
    with Caller(mock.base_url) as caller:
        return [caller.ask(prompt, **fields).text() for prompt in prompts]


def test_at_temperature_0_an_answer_depends_on_seed_and_prompt_alone(mock_teacher):
    first, again, other = (mock_teacher(seed=seed, accuracy=0.5) for seed in (1, 1, 2))
    answers_given = answers(first, SUMS[:100])
    assert answers(again, reversed(SUMS[:100])) == answers_given[::-1]
    assert answers(first, SUMS[:100]) == answers_given
    assert answers(other, SUMS[:100]) != answers_given


def test_above_temperature_0_samples_differ_and_a_seed_repeats_them(mock_teacher):
    first, second = (mock_teacher(accuracy=0.5) for _ in range(2))
    prompt = [SUMS[0]] * 40
    unseeded = answers(first, prompt, temperature=1)
    assert answers(second, prompt, temperature=1) == unseeded
    assert len(set(unseeded)) > 2
    assert len(set(answers(first, prompt, temperature=1, seed=7))) == 1
    body = once(first.base_url, SUMS[0], temperature=1, seed=7, n=40).json()
    assert len({choice["message"]["content"] for choice in body["choices"]}) > 2
    cold = once(first.base_url, SUMS[0], n=40).json()
    assert len({choice["message"]["content"] for choice in cold["choices"]}) == 1


@pytest.mark.parametrize(("accuracy", "temperature"), [(0.8, 0), (0.8, 1), (0.0, 0), (1.0, 1)])
def test_errors_are_as_frequent_as_asked_and_known_to_the_ledger(mock_teacher, accuracy, temperature):
    mock = mock_teacher(accuracy={"sum": accuracy, "*": 1.0})
    answers_given = answers(mock, SUMS, temperature=temperature)
    right = sum(text == solve(prompt).answer for prompt, text in zip(SUMS, answers_given, strict=True))
    spread = 5 * math.sqrt(len(SUMS) * accuracy * (1 - accuracy))
    assert abs(right - accuracy * len(SUMS)) <= spread
    assert mock.state()["tasks"] == {"sum": {"answers": len(SUMS), "right": right}}
    entries = mock.ledger()["entries"]
    assert [entry["right"] for entry in entries] == [
        int(text == solve(prompt).answer) for prompt, text in zip(SUMS, answers_given, strict=True)
    ]
    assert entries[0]["prompt_sha256"] == hashlib.sha256(SUMS[0].encode()).hexdigest()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"model": None}, "model"),
    ],
)
def test_a_wrong_request_is_refused_as_openai_does(mock_teacher, change, param):
    mock = mock_teacher()
    with Caller(mock.base_url) as caller:
        reply = caller.send(body_of("x") | change)
    assert reply.status == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["param"] == param
    assert mock.totals()["requests"] == 0


def test_other_refusals(mock_teacher):
    mock = mock_teacher(context_tokens=100)
    with Caller(mock.base_url) as caller:
        unknown = caller.ask("x", model="gpt-9")
        assert (unknown.status, unknown.json()["error"]["code"]) == (404, "model_not_found")
        long = caller.ask("x", max_tokens=100)
        assert (long.status, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        for junk in (b"{", b"[]", b"\xff", b""):
            assert caller.send(junk).status == 400
        assert caller.send(body_of("x"), "/completions").status == 404
        assert caller.get("/chat/completions").json()["error"]["message"].startswith("Invalid URL")
        assert [row["id"] for row in caller.get("/models").json()["data"]] == ["mock-teacher"]


def test_a_key_is_required_where_one_is_named(mock_teacher, monkeypatch):
    monkeypatch.setenv("MOCK_TEST_KEY", "sk-right")
    mock = mock_teacher(require_key_env="MOCK_TEST_KEY")
    for key, status in (("sk-right", 200), ("sk-wrong", 401), (None, 401)):
        with Caller(mock.base_url, key) as caller:
            assert caller.ask("What is 1 + 2?").status == status
            assert caller.get("/models").status == status
            if status == 401:
                refused = caller.ask("x")
                assert refused.json()["error"]["code"] == "invalid_api_key"
                assert b"sk-" not in refused.body

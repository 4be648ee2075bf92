"""Test every fault of the mock teacher with a client that hides nothing, and its count of fired faults."""

from __future__ import annotations

import gzip
import json

import pytest

from harvester.errors import ConfigError
from harvester.mock_teacher.faults.actions import ACTIONS, LOST
from harvester.mock_teacher.faults.script import Script, load_script, read_rule, read_rules
from tests.raw_client import Caller, once, raw


@pytest.fixture
def faulty(mock_teacher):
    """Start a teacher whose every request meets one fault."""

    def start(action: str, **options):
        return mock_teacher(accuracy=1.0, faults=[{"action": action, "name": "it", **options}])

    return start


def proven(mock, heard):
    """The fault fired once; give back what was heard."""
    assert mock.fired() == {"it": 1}
    return heard


@pytest.mark.parametrize(
    "status", [400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 504, 520, 529]
)
def test_status(faulty, status):
    mock = faulty("status", status=status, code="some_code", message="no", retry_after="1.5")
    reply = proven(mock, once(mock.base_url))
    assert (reply.status, reply.json()["error"]["code"]) == (status, "some_code")
    assert reply.headers["retry-after"] == "1.5"
    assert mock.totals()["requests"] == 0


def test_status_with_another_body_and_headers(faulty):
    mock = faulty(
        "status",
        status=429,
        body="<html>busy</html>",
        content_type="text/html",
        headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT", "date": "Wed, 21 Oct 2015 07:27:00 GMT"},
    )
    reply = proven(mock, once(mock.base_url))
    assert reply.body == b"<html>busy</html>"
    assert reply.headers["content-type"] == "text/html"
    assert reply.headers["date"] == "Wed, 21 Oct 2015 07:27:00 GMT"


def test_redirect(faulty):
    mock = faulty("redirect", location="http://127.0.0.1:9/x", status=308)
    reply = proven(mock, once(mock.base_url))
    assert (reply.status, reply.headers["location"]) == (308, "http://127.0.0.1:9/x")


def test_html_200(faulty):
    mock = faulty("html")
    reply = proven(mock, once(mock.base_url))
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert mock.totals()["requests"] == 0


def test_error_inside_200(faulty):
    mock = faulty("error_200", code=429, message="slow down")
    reply = proven(mock, once(mock.base_url))
    assert reply.status == 200
    assert reply.json()["error"]["code"] == 429


def choice_of(body):
    return body["choices"][0]


ANSWER_CASES = [
    ("delay", {}, lambda b: choice_of(b)["message"]["content"] == "42"),
    ("patch", {"value": {"model": "x", "usage": None}}, lambda b: b["model"] == "x" and "usage" not in b),
    ("choice", {"value": {"index": 3}}, lambda b: choice_of(b)["index"] == 3),
    ("message", {"value": {"role": "tool"}}, lambda b: choice_of(b)["message"]["role"] == "tool"),
    ("content", {"value": "\x1b[31m<b>"}, lambda b: choice_of(b)["message"]["content"] == "\x1b[31m<b>"),
    ("null_content", {}, lambda b: choice_of(b)["message"]["content"] is None),
    ("empty_content", {}, lambda b: choice_of(b)["message"]["content"] == ""),
    ("refusal", {}, lambda b: choice_of(b)["message"]["refusal"] and not choice_of(b)["message"]["content"]),
    ("reasoning", {"value": "hm"}, lambda b: choice_of(b)["message"]["reasoning_content"] == "hm"),
    (
        "tool_call",
        {"function": "f"},
        lambda b: choice_of(b)["message"]["tool_calls"][0]["function"]["name"] == "f",
    ),
    (
        "length",
        {},
        lambda b: (choice_of(b)["finish_reason"], choice_of(b)["message"]["content"]) == ("length", "4"),
    ),
    ("content_filter", {}, lambda b: choice_of(b)["finish_reason"] == "content_filter"),
    ("finish_reason", {"value": "network_error"}, lambda b: choice_of(b)["finish_reason"] == "network_error"),
    ("usage", {"value": {"prompt_tokens": -5}}, lambda b: b["usage"] == {"prompt_tokens": -5}),
    ("usage", {"value": "many"}, lambda b: b["usage"] == "many"),
    ("usage", {"value": {"prompt_tokens": 10**18}}, lambda b: b["usage"]["prompt_tokens"] == 10**18),
    ("no_usage", {}, lambda b: "usage" not in b),
    ("id", {}, lambda b: b["id"] == "chatcmpl-duplicate"),
    ("no_id", {}, lambda b: "id" not in b),
    ("model", {}, lambda b: b["model"] == "another-model"),
    ("parts", {"reasoning": "hm"}, lambda b: len(choice_of(b)["message"]["content"]) == 3),
    ("think", {}, lambda b: choice_of(b)["message"]["content"].endswith("</think>\n\n42")),
    ("think", {"form": "opening"}, lambda b: "</think>" not in choice_of(b)["message"]["content"]),
    ("blank_content", {}, lambda b: not choice_of(b)["message"]["content"].strip()),
    ("no_message", {}, lambda b: "message" not in choice_of(b)),
    ("error_beside", {"code": 429}, lambda b: b["error"]["code"] == 429 and b["choices"]),
    ("error_beside", {"place": "choice"}, lambda b: choice_of(b)["error"]["code"] == 502),
    ("base_resp", {}, lambda b: b["choices"] is None and b["base_resp"]["status_code"] == 1008),
    ("envelope", {}, lambda b: "choices" not in b and choice_of(b["data"])["message"]),
    ("null_logprobs", {}, lambda b: choice_of(b)["message"]["content"] == "42"),
    ("legacy_logprobs", {}, lambda b: choice_of(b)["logprobs"]["tokens"] == []),
    ("fingerprint", {}, lambda b: b["system_fingerprint"] == "mock-changed"),
    ("empty_choices", {}, lambda b: b["choices"] == []),
    ("null_choices", {}, lambda b: b["choices"] is None),
    ("no_choices", {}, lambda b: "choices" not in b),
    ("extra_choice", {}, lambda b: [c["index"] for c in b["choices"]] == [0, 1]),
    ("wrong_index", {}, lambda b: choice_of(b)["index"] == 7),
]


@pytest.mark.parametrize(("action", "options", "holds"), ANSWER_CASES)
def test_spoilt_answers_are_billed(faulty, action, options, holds):
    mock = faulty(action, **options)
    reply = proven(mock, once(mock.base_url))
    assert reply.status == 200
    assert holds(reply.json())
    assert mock.totals()["answers"] == 1
    streamed = once(mock.base_url, stream=True, stream_options={"include_usage": True})
    assert streamed.events()[-1] == "[DONE]"


BODY_CASES = [
    ("long_header", {}, lambda b: b.startswith(b"{")),
    ("junk_json", {}, lambda b: b.startswith(b"{not")),
    ("truncated_json", {}, lambda b: b.startswith(b'{"id"') and not b.endswith(b"}")),
    ("invalid_utf8", {}, lambda b: b"\xff\xfe" in b),
    ("bom", {}, lambda b: b.startswith(b"\xef\xbb\xbf{")),
    ("nan", {}, lambda b: json.loads(b)["score"] != json.loads(b)["score"]),
    ("duplicate_keys", {}, lambda b: b.count(b'"id":') == 2),
    ("deep_json", {"depth": 5000}, lambda b: b.count(b"[") > 5000),
    ("big_integer", {}, lambda b: b"9" * 5000 in b),
    ("lone_surrogate", {}, lambda b: json.loads(b)["choices"][0]["message"]["content"] == "\ud80042"),
    ("nul", {}, lambda b: json.loads(b)["choices"][0]["message"]["content"] == "\x0042"),
    ("empty_body", {}, lambda b: b == b""),
    ("body", {"value": [1, 2]}, lambda b: json.loads(b) == [1, 2]),
    ("content_type", {}, lambda b: json.loads(b)["choices"]),
    ("headers", {"value": {"x-extra": "1"}}, lambda b: json.loads(b)["choices"]),
    (
        "around",
        {"prefix": ":\n\n", "suffix": "[DONE]"},
        lambda b: b[:4] == b":\n\n{" and b.endswith(b"}[DONE]"),
    ),
    ("answer_status", {"status": 203}, lambda b: json.loads(b)["choices"]),
]


@pytest.mark.parametrize(("action", "options", "holds"), BODY_CASES)
def test_spoilt_bodies(faulty, action, options, holds):
    mock = faulty(action, **options)
    reply = proven(mock, once(mock.base_url))
    assert reply.status == (203 if action == "answer_status" else 200)
    assert holds(reply.body)
    if action == "content_type":
        assert reply.headers["content-type"] == "text/plain"
    if action == "headers":
        assert reply.headers["x-extra"] == "1"
    assert mock.totals() | {"cut": 0} == mock.totals() | {"cut": 0, "answers": 1}


def test_gzip_bomb(faulty):
    mock = faulty("gzip_bomb", decoded_bytes=8 * 2**20)
    reply = proven(mock, once(mock.base_url))
    assert reply.headers["content-encoding"] == "gzip"
    assert len(reply.body) < 100_000
    assert len(json.loads(gzip.decompress(reply.body))["choices"][0]["message"]["content"]) == 8 * 2**20


STREAM_ACTIONS = [
    "no_done",
    "stream_cut",
    "stream_error",
    "stream_junk",
    "stream_comments",
    "stream_no_finish",
    "stream_split_emoji",
    "stream_no_blank_lines",
    "stream_so_far",
    "stream_twice",
]


@pytest.mark.parametrize("action", STREAM_ACTIONS)
def test_spoilt_streams(faulty, action):
    mock = faulty(action)
    plain = once(mock.base_url)
    assert plain.status == 200
    assert mock.fired() == {"it": 0}
    reply = proven(mock, once(mock.base_url, stream=True))
    done = b"data: [DONE]" in reply.body
    assert done == (action not in ("no_done", "stream_cut", "stream_error"))
    assert (b'"finish_reason":"stop"' in reply.body) == (
        action not in ("stream_no_finish", "stream_cut", "stream_error")
    )
    assert (b"\\ud83d" in reply.body) == (action == "stream_split_emoji")
    if action == "stream_error":
        assert reply.events()[-1]["error"]["code"] == 500
    assert (b"\n\n" in reply.body) == (action != "stream_no_blank_lines")
    assert (b'{"content":"42"}' in reply.body) == (
        action == "stream_so_far" or b'{"content":"4"}' not in reply.body
    )
    assert (reply.body.count(b'"finish_reason":"stop"') == 2) == (action == "stream_twice")
    assert (b": keep-alive" in reply.body) == (action == "stream_comments")
    assert (b"{not json" in reply.body) == (action == "stream_junk")


def test_choices_out_of_order(faulty):
    mock = faulty("reversed_choices")
    reply = proven(mock, once(mock.base_url, n=3))
    assert [choice["index"] for choice in reply.json()["choices"]] == [2, 1, 0]


def test_choices_in_an_order_of_their_own(faulty):
    mock = faulty("shuffled_choices")
    reply = proven(mock, once(mock.base_url, n=4))
    assert [choice["index"] for choice in reply.json()["choices"]] == [1, 3, 2, 0]


def test_fewer_choices_are_billed_as_such(faulty):
    mock = faulty("fewer_choices", count=3)
    reply = proven(mock, once(mock.base_url, n=4))
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2]
    (charge,) = mock.ledger()["entries"]
    assert charge["choices"] == 3
    assert charge["completion_tokens"] == reply.json()["usage"]["completion_tokens"]


def test_two_choices_with_one_index(faulty):
    mock = faulty("repeated_choice")
    reply = proven(mock, once(mock.base_url, n=3))
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 0]


def test_one_choice_of_several_may_be_spoilt(faulty):
    mock = faulty("content_filter", at=2)
    reply = proven(mock, once(mock.base_url, n=4))
    finishes = [choice["finish_reason"] for choice in reply.json()["choices"]]
    assert finishes == ["stop", "stop", "content_filter", "stop"]


def test_n_above_its_maximum_is_refused_or_answered_with_fewer(mock_teacher):
    strict, lenient = mock_teacher(max_n=2), mock_teacher(max_n=2, n_above="fewer")
    refused = once(strict.base_url, n=3)
    assert (refused.status, refused.json()["error"]["param"]) == (400, "n")
    assert once(strict.base_url, n=2).status == 200
    assert len(once(lenient.base_url, n=3).json()["choices"]) == 2
    assert (strict.totals()["answers"], lenient.totals()["answers"]) == (2, 2)


def test_the_choices_of_a_stream_come_in_turns(mock_teacher):
    mock = mock_teacher()
    events = once(mock.base_url, n=2, stream=True).events()[:-1]
    order = [choice["index"] for event in events for choice in event["choices"]]
    assert order[:4] == [0, 1, 0, 1]


def split_head(data: bytes) -> tuple[bytes, bytes, int]:
    head, _, body = data.partition(b"\r\n\r\n")
    length = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
    return head, body, int(length[0].split(b":")[1]) if length else -1


WIRE_CASES = [
    ("silence", {}, "silence", lambda d: d == b""),
    ("reset", {}, "reset", lambda d: d == b""),
    ("fin", {}, "fin", lambda d: d == b""),
    ("reset_body", {}, "reset", lambda d: True),
    ("cut_body", {"share": 0.5}, "fin", lambda d: 0 < len(split_head(d)[1]) < split_head(d)[2]),
    ("chunk_cut", {}, "fin", lambda d: b"chunked" in d and not d.endswith(b"0\r\n\r\n")),
    ("chunk_no_end", {}, "fin", lambda d: b"chunked" in d and not d.endswith(b"0\r\n\r\n")),
    ("length_no_end", {}, "fin", lambda d: len(split_head(d)[1]) + 10 == split_head(d)[2]),
    ("open_end", {}, "silence", lambda d: b"chunked" in d and d.rstrip().endswith(b"}")),
    ("stall_body", {}, "silence", lambda d: 0 < len(split_head(d)[1]) < split_head(d)[2]),
    ("fin_headers", {}, "fin", lambda d: d.startswith(b"HTTP/1.1 200") and b"\r\n\r\n" not in d),
    ("garbage_status", {}, "fin", lambda d: not d.startswith(b"HTTP/")),
    ("endless_headers", {"bytes": 2**20}, "fin", lambda d: len(d) > 2**19 and b"\r\n\r\n" not in d),
    ("huge_body", {"bytes": 2**22}, "fin", lambda d: len(split_head(d)[1]) == split_head(d)[2] == 2**22),
    ("close_idle", {}, "fin", lambda d: len(split_head(d)[1]) == split_head(d)[2]),
    ("drip", {"bytes": 64, "interval_s": 0.001}, "fin", lambda d: len(split_head(d)[1]) == split_head(d)[2]),
]


@pytest.mark.parametrize(("action", "options", "how", "holds"), WIRE_CASES)
def test_cut_wires_are_billed(faulty, action, options, how, holds):
    mock = faulty(action, **options)
    ending = proven(mock, raw(mock.base_url))
    assert ending.how == how
    assert holds(ending.data)
    charge = mock.ledger()["entries"][0]
    assert charge["cut"] == (action in LOST)
    assert charge["fault"] == "it"


def test_a_crawling_reply_is_slow_but_steady(faulty):
    mock = faulty("drip", bytes=1, interval_s=0.05)
    ending = raw(mock.base_url, most_bytes=3)
    assert ending.data.startswith(b"HTT")


def test_every_action_has_a_test():
    in_tables = {case[0] for case in [*ANSWER_CASES, *BODY_CASES, *WIRE_CASES]} | set(STREAM_ACTIONS)
    of_choices = {"reversed_choices", "shuffled_choices", "fewer_choices", "repeated_choice"}
    assert in_tables | of_choices | {"status", "redirect", "html", "error_200", "gzip_bomb"} == set(ACTIONS)


def test_a_fault_may_say_that_it_is_not_billed_and_add_a_delay(faulty):
    mock = faulty("reset", billed=False, delay_s=0.01)
    assert raw(mock.base_url).how == "reset"
    assert mock.totals()["requests"] == 0


def test_a_retry_after_an_unbilled_fault_gets_the_first_sample(mock_teacher):
    calm = mock_teacher(accuracy=0.5)
    shaky = mock_teacher(accuracy=0.5, faults=[{"action": "status", "attempt": 1}])
    replies = [once(shaky.base_url, temperature=1), once(shaky.base_url, temperature=1)]
    assert [reply.status for reply in replies] == [500, 200]
    assert replies[1].text() == once(calm.base_url, temperature=1).text()


def test_models_has_its_own_ordinals(mock_teacher):
    mock = mock_teacher(faults=[{"action": "status", "status": 401, "on": "models", "nth": 2}])
    with Caller(mock.base_url) as caller:
        assert caller.ask("What is 1 + 2?").status == 200
        assert [caller.get("/models").status for _ in range(3)] == [200, 401, 200]


def fired_at(rows, requests=12):
    script = Script(read_rules(rows))
    return [n for n in range(1, requests + 1) if script.match(n, text=f"p{n}", body=b"%d" % (n % 4))]


@pytest.mark.parametrize(
    ("conditions", "ordinals"),
    [
        ({"nth": 3}, [3]),
        ({"nth": [2, 5]}, [2, 5]),
        ({"every": 5}, [5, 10]),
        ({"first": 2}, [1, 2]),
        ({"after": 10}, [11, 12]),
        ({"after": 2, "times": 3}, [3, 4, 5]),
        ({"prompt": "p1"}, [1, 10, 11, 12]),
        ({"attempt": 1}, [1, 2, 3, 4]),
        ({"attempt": [2, 3]}, [5, 6, 7, 8, 9, 10, 11, 12]),
        ({"probability": 1.0, "times": 1}, [1]),
        ({"probability": 0.0}, []),
    ],
)
def test_conditions(conditions, ordinals):
    assert fired_at([{"action": "reset", **conditions}]) == ordinals


def test_probability_depends_on_body_and_attempt_not_on_order():
    rows = read_rules([{"action": "reset", "probability": 0.5, "seed": 3}])
    bodies = [b"%d" % n for n in range(400)]
    forward, backward = Script(rows), Script(rows)
    hit = {body for n, body in enumerate(bodies, 1) if forward.match(n, body=body)}
    assert hit == {body for n, body in enumerate(reversed(bodies), 1) if backward.match(n, body=body)}
    assert 140 <= len(hit) <= 260  # 6 standard deviations around 200


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"action": "rest"}, "did you mean 'reset'"),
        ({"action": "reset", "nht": 3}, "did you mean 'nth'"),
        ({"action": "reset", "nth": 0}, "nth must be"),
        ({"action": "reset", "every": 0}, "every must be"),
        ({"action": "reset", "first": "two"}, "first must be"),
        ({"action": "reset", "on": "files"}, "on must be"),
        ({"action": "length", "on": "models"}, "no answer or stream"),
        ({"action": "reset", "probability": "often"}, "probability must be"),
        ({"action": "status", "status": 700}, "status must be"),
        ({"action": "status", "headers": "x"}, "headers must be"),
        ({"action": "cut_body", "share": 2}, "share must be"),
        ({"action": "huge_body", "bytes": 0}, "bytes must be"),
        ({"action": "content"}, "content needs a value"),
        ({"action": "patch", "value": 3}, "patch needs an object"),
        ({}, "unknown fault action None"),
    ],
)
def test_a_wrong_rule_is_named(row, words):
    with pytest.raises(ConfigError, match=words):
        read_rule(row, "script.toml: fault 1")


def test_scripts_are_read_from_toml_and_json(tmp_path):
    (tmp_path / "a.toml").write_text('[[fault]]\naction = "status"\nstatus = 503\nevery = 2\n')
    (tmp_path / "a.json").write_text('{"fault": [{"action": "status", "status": 503, "every": 2}]}')
    assert load_script(tmp_path / "a.toml") == load_script(tmp_path / "a.json")
    (tmp_path / "b.toml").write_text("[[fault]\n")
    for name in ("b.toml", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            load_script(tmp_path / name)

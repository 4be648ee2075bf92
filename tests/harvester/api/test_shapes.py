"""Every known shape of an answer is understood; what is not understood is never `ok`."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from typing import Any

import orjson
import pytest

from harvester.api.replies.completion import is_complete, parse
from harvester.api.shapes import turn_marks
from harvester.api.types import Outcome
from harvester.errors import (
    BrokenAnswer,
    ConnectionBroken,
    PromptRejected,
    RateLimited,
    TeacherRefused,
    TeacherUnavailable,
)


def body(message: Any, finish: Any = "stop", /, **more: Any) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more})


def events(*deltas: Any, finish: str | None = "stop", done: bool = True) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    if finish is not None:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    lines = [b"data: " + orjson.dumps(chunk) for chunk in chunks] + [b"data: [DONE]"] * done
    return b"\n\n".join(lines) + b"\n\n"


def part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, kind: text} if kind == "thinking" else {"type": kind, "text": text}


THINKING = {"type": "thinking", "thinking": [part("Let me add.")]}


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ([part("a"), part("b")], "ab", None),
        ([THINKING, part("4")], "4", "Let me add."),
        (["a", part("b", "output_text")], "ab", None),
        (part("4"), "4", None),
        ({"text": {"value": "4"}}, "4", None),
        ({"parts": [{"text": "hm", "thought": True}, {"text": "4"}]}, "4", "hm"),
        ([part("4"), {"type": "reference", "reference_ids": [1]}], "4", None),
    ],
)
def test_content_in_any_known_shape(content: Any, text: str, reasoning: str | None) -> None:
    for raw in (body({"content": content}), events({"content": content})):
        parsed = parse(raw)
        assert (parsed.text, parsed.reasoning, parsed.outcome) == (text, reasoning, Outcome.OK)


@pytest.mark.parametrize(
    "content", [7, True, {}, [7], [{"type": "image_url", "image_url": "x"}], {"x": 1}, [part("a"), False]]
)
def test_what_is_not_understood_is_never_ok(content: Any) -> None:
    assert parse(body({"content": content})).outcome is Outcome.UNKNOWN
    assert parse(events({"content": "a"}, {"content": content})).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("pieces", "text", "outcome"),
    [
        ([[part("The answer ")], [part("is four")], [part(".")]], "The answer is four.", Outcome.OK),
        ([[part("The ")], "answer ", "is ", "4"], "The answer is 4", Outcome.OK),
        ([part("The answer "), "is 4"], "The answer is 4", Outcome.OK),
        (["The answer ", 0, "is 4"], "The answer is 4", Outcome.UNKNOWN),
        (["The answer ", None, "is 4"], "The answer is 4", Outcome.OK),
        (["The answer ", [], "is 4"], "The answer is 4", Outcome.OK),
        (["The answer ", {}, "is 4"], "The answer is 4", Outcome.UNKNOWN),
    ],
)
def test_pieces_of_any_type_are_joined(pieces: list[Any], text: str, outcome: Outcome) -> None:
    parsed = parse(events(*({"content": piece} for piece in pieces)))
    assert (parsed.text, parsed.outcome) == (text, outcome)


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm"},
        {"reasoning": "hm"},
        {"thinking": "hm"},
        {"reasoning": {"content": "hm"}},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}], "reasoning": None},
        {"thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        {"reasoning_content": "hm", "reasoning": "hm"},
    ],
)
def test_reasoning_in_its_spellings(message: dict[str, Any]) -> None:
    for raw in (body({"content": "4", **message}), events(message, {"content": "4"})):
        parsed = parse(raw)
        assert (parsed.text, parsed.reasoning, parsed.outcome) == ("4", "hm", Outcome.OK)


@pytest.mark.parametrize(
    ("content", "text", "reasoning", "outcome"),
    [
        ("<think>hm</think>4", "4", "hm", Outcome.OK),
        ("\n<think>\nhm\n</think>\n\n4", "4", "hm", Outcome.OK),
        ("hm\n</think>\n\n4", "4", "hm", Outcome.OK),
        ("<think>hm", "", "hm", Outcome.EMPTY),
        ("<think></think>4", "4", None, Outcome.OK),
        ("[THINK]hm[/THINK]4", "4", "hm", Outcome.OK),
        ("<think>a</think>\n<think>b</think>\n4", "4", "a\n\nb", Outcome.OK),
        ("Write `<think>` first.", "Write `<think>` first.", None, Outcome.OK),
        ("```\n<think>x</think>\n```", "```\n<think>x</think>\n```", None, Outcome.OK),
        ("Sure! <think>hm</think> 4", "Sure! <think>hm</think> 4", None, Outcome.UNKNOWN),
    ],
)
def test_reasoning_between_tags(content: str, text: str, reasoning: str | None, outcome: Outcome) -> None:
    parsed = parse(body({"content": content}))
    assert (parsed.text, parsed.reasoning, parsed.outcome) == (text, reasoning, outcome)


def test_reasoning_cut_before_its_closing_tag_is_no_answer() -> None:
    parsed = parse(body({"content": "<think>hm, let me"}, "length"))
    assert (parsed.text, parsed.reasoning, parsed.outcome) == ("", "hm, let me", Outcome.TRUNCATED)


@pytest.mark.parametrize(
    ("word", "outcome"),
    [
        *(
            (word, Outcome.OK)
            for word in ("eos_token", "STOP", "end_turn", "stop_sequence", "COMPLETE", "</s>")
        ),
        *(
            (word, Outcome.TRUNCATED)
            for word in ("max_tokens", "MAX_TOKENS", "model_length", "maxOutputTokens")
        ),
        *((word, Outcome.FILTERED) for word in ("SAFETY", "content-filter", "sensitive", "RECITATION")),
        ("refusal", Outcome.REFUSED),
        *(
            (word, Outcome.UNKNOWN)
            for word in ("because", "FINISH_REASON_UNSPECIFIED", None, 7, True, {"a": 1})
        ),
        ({"type": "stop", "reason": "eos"}, Outcome.OK),
    ],
)
def test_finish_words(word: Any, outcome: Outcome) -> None:
    assert parse(body({"content": "4"}, word)).outcome is outcome


@pytest.mark.parametrize("word", ["insufficient_system_resource", "abort", "ERROR", "cancelled", "timeout"])
def test_a_break_is_asked_again(word: str) -> None:
    with pytest.raises(BrokenAnswer) as caught:
        parse(body({"content": "half"}, word))
    assert not caught.value.is_permanent
    assert word in str(caught.value)


@pytest.mark.parametrize("content", ["\n\n", " ", "\t\u3000", [part(" "), part("\n")]])
def test_white_space_only_is_empty(content: Any) -> None:
    assert parse(body({"content": content})).outcome is Outcome.EMPTY


ERRORS = [
    ({"code": 502}, TeacherUnavailable),
    ({"code": 429, "message": "slow down"}, RateLimited),
    ({"code": 402, "message": "no credits"}, TeacherRefused),
    ({"message": "Rate limit reached"}, RateLimited),
    ({"code": "insufficient_quota"}, TeacherRefused),
    ({"code": 403, "message": "flagged", "metadata": {"flagged_input": "x"}}, PromptRejected),
    ({"code": "²", "message": "odd"}, BrokenAnswer),
    ({"code": "9" * 5000, "message": "odd"}, BrokenAnswer),
    ("it broke", BrokenAnswer),
]


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("content", [None, "", "half"])
def test_an_error_anywhere_is_found_before_the_answer(error: Any, kind: type, content: Any) -> None:
    message = {"role": "assistant", "content": content}
    documents: list[dict[str, Any]] = [
        {"choices": [{"message": message, "finish_reason": None}], "error": error},
        {"choices": [{"message": message, "finish_reason": None, "error": error}]},
        {"choices": [{"message": {**message, "error": error}, "finish_reason": "error"}]},
        {"choices": None, "error": error},
        {"data": {"error": error}},
    ]
    for document in documents:
        with pytest.raises(kind):
            parse(orjson.dumps(document))


@pytest.mark.parametrize(
    ("document", "kind", "words"),
    [
        (
            {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
            TeacherRefused,
            "balance",
        ),
        ({"base_resp": {"status_code": 1002, "status_msg": "rate limit"}}, RateLimited, "rate limit"),
        ({"base_resp": {"status_code": 1027, "status_msg": "new_sensitive"}}, PromptRejected, "sensitive"),
        ({"code": 50505, "message": "model is overloaded", "data": None}, RateLimited, "overloaded"),
        ({"error_code": 18, "error_msg": "Open api qps request limit reached"}, RateLimited, "qps"),
        ({"code": "Throttling.RateQuota", "message": "Requests throttled"}, RateLimited, "throttled"),
        ({"object": "error", "message": "context length exceeded", "code": 400}, PromptRejected, "context"),
        ({"Response": {"Error": {"Code": "AuthFailure", "Message": "odd words"}}}, BrokenAnswer, "odd words"),
        ({"header": {"code": 10013, "message": "odd words"}}, BrokenAnswer, "odd words"),
        ({"detail": "Internal Server Error"}, TeacherUnavailable, "Internal"),
        ([{"error": {"code": 503, "status": "UNAVAILABLE", "message": "busy"}}], TeacherUnavailable, "busy"),
        ({"success": False, "msg": "odd words"}, BrokenAnswer, "odd words"),
        ({"promptFeedback": {"blockReason": "SAFETY"}}, PromptRejected, "SAFETY"),
        ({"hello": "odd words"}, BrokenAnswer, "odd words"),
    ],
)
def test_a_vendors_error_is_classified_and_quoted(document: Any, kind: type, words: str) -> None:
    if isinstance(document, dict):
        document = {"choices": None, **document}
    with pytest.raises(kind) as caught:
        parse(orjson.dumps(document))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "more",
    [
        {"error": None},
        {"error": {}},
        {"error": ""},
        {"error": {"code": 0, "message": "success"}},
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"code": 200, "message": "ok"},
    ],
)
def test_success_next_to_an_answer_is_no_error(more: dict[str, Any]) -> None:
    assert parse(body({"content": "4"}, **more)).outcome is Outcome.OK


def test_words_of_unknown_meaning_next_to_a_finished_answer_leave_it_flagged() -> None:
    parsed = parse(body({"content": "4"}, error={"message": "a warning"}))
    assert (parsed.text, parsed.outcome) == ("4", Outcome.UNKNOWN)


@pytest.mark.parametrize(
    ("document", "outcome"),
    [
        ({"data": {"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]}}, Outcome.OK),
        ({"output": {"text": "4", "finish_reason": "stop"}, "code": "", "message": ""}, Outcome.OK),
        (
            {"output": [{"type": "message", "content": [part("4", "output_text")]}], "status": "completed"},
            Outcome.OK,
        ),
        ({"type": "message", "content": [part("4")], "stop_reason": "end_turn"}, Outcome.OK),
        ({"candidates": [{"content": {"parts": [{"text": "4"}]}, "finishReason": "STOP"}]}, Outcome.OK),
        ({"message": {"role": "assistant", "content": "4"}, "done": True, "done_reason": "stop"}, Outcome.OK),
        ([{"generated_text": "4"}], Outcome.UNKNOWN),
        ({"choices": [{"text": "4", "finish_reason": "stop"}]}, Outcome.OK),
        ({"choices": {"message": {"content": "4"}, "finish_reason": "stop"}}, Outcome.OK),
        ({"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}, Outcome.OK),
        ({"choices": [{"message": "4", "finish_reason": "stop"}]}, Outcome.OK),
        ({"choices": [{"message": "4"}]}, Outcome.UNKNOWN),
    ],
)
def test_an_answer_in_any_known_envelope(document: Any, outcome: Outcome) -> None:
    parsed = parse(orjson.dumps(document))
    assert (parsed.text, parsed.outcome) == ("4", outcome)


@pytest.mark.parametrize(
    ("choice", "outcome"),
    [
        ({"finish_reason": "content_filter", "content_filter_results": {}}, Outcome.FILTERED),
        ({"finish_reason": "length"}, Outcome.TRUNCATED),
        ({"finish_reason": "stop", "message": None}, Outcome.EMPTY),
        ({"message": 5, "finish_reason": "stop"}, Outcome.UNKNOWN),
    ],
)
def test_a_paid_choice_without_a_message_is_kept(choice: dict[str, Any], outcome: Outcome) -> None:
    raw = orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 0}})
    parsed = parse(raw, 3)
    assert (parsed.outcome, parsed.usage.source) == (outcome, "reported")


def test_a_null_log_probability_keeps_its_place() -> None:
    def entry(token: str, logprob: Any) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "top_logprobs": 1}

    listed = {"content": [entry("a", -0.5), entry("b", None), 7, entry("c", "x"), entry("d", -1)]}
    legacy = {"tokens": ["a", "b", "c", "d"], "token_logprobs": [-0.5, None, "x", -1], "top_logprobs": 1}
    for logprobs, tokens in ((listed, ["a", "b", "", "c", "d"]), (legacy, ["a", "b", "c", "d"])):
        raw = orjson.dumps(
            {"choices": [{"message": {"content": "abcd"}, "finish_reason": "stop", "logprobs": logprobs}]}
        )
        parsed = parse(raw)
        assert [token.token for token in parsed.logprobs] == tokens
        assert (parsed.logprobs[0].logprob, parsed.logprobs[1].logprob, parsed.logprobs[-1].logprob) == (
            -0.5,
            None,
            -1.0,
        )
        assert parse(raw, logprobs=False).outcome is parsed.outcome is Outcome.OK


def test_an_emoji_split_over_two_events_is_whole() -> None:
    escaped = events({"content": "a@"}, {"content": "@b"})
    for first, second in ((b"\\ud83d", b"\\ude00"), (b"\xf0\x9f", b"\x98\x80")):
        parsed = parse(escaped.replace(b"a@", b"a" + first).replace(b"@b", second + b"b"))
        assert (parsed.text, parsed.outcome) == ("a\N{GRINNING FACE}b", Outcome.OK)
    parsed = parse(escaped.replace(b"a@", b"a\\ud83d").replace(b"@b", b"b"))
    assert (parsed.text, parsed.outcome) == ("a?b", Outcome.UNKNOWN)


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (events({"content": "4"}, done=False), Outcome.OK),
        (events({"content": "4"}, finish=None), Outcome.UNKNOWN),
        (events({"content": "4"}).replace(b"[DONE]", b"[done]"), Outcome.OK),
        (events({"content": "4"}) + b"data: {cut", Outcome.OK),
        (b"data: ping\n\n: hello\n\n" + events({"content": "4"}), Outcome.OK),
        (b"data: {junk\n\n" + events({"content": "4"}), Outcome.UNKNOWN),
        (events({"content": "4"}, done=False) + b'data: {"choices', Outcome.OK),
        (b'{"message":{"content":"4"}}\n{"message":{"content":""},"done_reason":"stop"}\n', Outcome.OK),
    ],
)
def test_a_stream_that_is_not_word_perfect_is_kept(raw: bytes, outcome: Outcome) -> None:
    parsed = parse(raw)
    assert (parsed.text, parsed.outcome) == ("4", outcome)
    assert is_complete(raw)


def test_an_error_event_is_quoted() -> None:
    start = events({"content": "ha"}, finish=None, done=False)
    for tail in (b'event: error\ndata: {"message":"odd words"}\n\n', b"event: error\ndata: odd words\n\n"):
        with pytest.raises(BrokenAnswer, match="odd words") as caught:
            parse(start + tail)
        assert caught.value.maybe_billed


def test_messages_in_place_of_deltas() -> None:
    def chunk(text: str, **more: Any) -> bytes:
        choice = {"index": 0, "message": {"content": text}, **more}
        return b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n"

    whole_so_far = chunk("The") + chunk("The answer") + chunk("The answer is 4", finish_reason="stop")
    assert parse(whole_so_far).text == "The answer is 4"
    both = events({"content": "4"}, done=False) + chunk("4", delta={})
    assert parse(both).text == "4"


def test_function_call_arguments_in_pieces() -> None:
    raw = events(
        {"function_call": {"name": "f", "arguments": '{"x"'}},
        {"function_call": {"arguments": ":1}"}},
        finish="function_call",
    )
    parsed = parse(raw)
    assert parsed.outcome is Outcome.TOOL_CALL
    assert orjson.loads(parsed.tool_calls_json or "") == {"name": "f", "arguments": '{"x":1}'}


@pytest.mark.parametrize(
    ("usage", "text", "is_disproved"),
    [
        ({"prompt_tokens": 0, "completion_tokens": 0}, "four words are here", True),
        ({"prompt_tokens": 9, "completion_tokens": 0}, "4", True),
        ({"prompt_tokens": 9, "completion_tokens": 1}, "word " * 60, True),
        ({"prompt_tokens": 9, "completion_tokens": 2}, "x" * 2000, True),
        ({"prompt_tokens": 0, "completion_tokens": 1}, "4", True),
        ({"prompt_tokens": 9, "completion_tokens": 60}, "word " * 60, False),
        ({"input_tokens": 9, "output_tokens": 1}, "4", False),
        ({"prompt_tokens": 9.0, "completion_tokens": 1.0}, "4", False),
        ({"prompt_tokens": 9, "completion_tokens": 0}, "", False),
    ],
)
def test_a_count_that_the_answer_disproves_is_no_count(
    usage: dict[str, Any], text: str, is_disproved: bool
) -> None:
    parsed = parse(body({"content": text}, usage=usage), 9)
    assert parsed.usage.source == ("corrected" if is_disproved else "reported")
    if text and is_disproved:
        assert parsed.usage.input_tokens >= 9
        assert parsed.usage.output_tokens >= len(text) // 5


def _tool_pieces(count: int) -> list[Any]:
    return [
        {"tool_calls": [{"index": number, "id": str(number), "function": {"name": "f", "arguments": "{}"}}]}
        for number in range(count)
    ]


@pytest.mark.parametrize(
    "deltas",
    [
        [{"content": "x" * 4_000_000}, *({"content": "y"} for _ in range(20_000))],
        _tool_pieces(20_000),
        [{"content": [part("y")]} for _ in range(20_000)],
        [{"reasoning_content": "y"} for _ in range(20_000)],
    ],
    ids=["large-then-small", "tool-calls", "parts", "reasoning"],
)
def test_a_stream_costs_time_in_proportion_to_its_bytes(deltas: list[Any]) -> None:
    raw = events(*deltas)
    started = time.process_time()
    parse(raw)
    assert time.process_time() - started < 5.0  # tenths of a second; quadratic it was a minute and more


@pytest.mark.parametrize(
    ("content", "text", "reasoning"),
    [
        ('<think>it ends "here"</think>42', "42", 'it ends "here"'),
        ("<think>call `f</think>42", "42", "call `f"),
        ("<think>```\nx = 1</think>42", "42", "```\nx = 1"),
        ('<think>the tag "</think>" ends it</think>42', "42", 'the tag "</think>" ends it'),
        ('it\'s "so"</think>42', "42", 'it\'s "so"'),
    ],
)
def test_a_half_quote_or_open_code_in_reasoning_does_not_hide_its_end(
    content: str, text: str, reasoning: str
) -> None:
    document = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    parsed = parse(json.dumps(document).encode())
    assert (parsed.outcome, parsed.text, parsed.reasoning) == ("ok", text, reasoning)


@pytest.mark.parametrize("choices", [0, None, 1])
def test_the_choice_without_an_index_is_the_first_where_zeros_are_omitted(choices: int | None) -> None:
    """Servers that write protobuf as JSON leave out members that are zero."""
    choice = {"message": {"content": "42"}, "finish_reason": "stop"}
    other = {"index": 1, "message": {"content": "another"}, "finish_reason": "stop"}
    document = {"choices": [other, choice] if choices != 1 else [other, {**other, "index": 2}]}
    parsed = parse(json.dumps(document).encode())
    expected = ("ok", "42") if choices != 1 else ("unknown", "another")
    assert (parsed.outcome, parsed.text) == expected


@pytest.mark.parametrize("index", [[1], True, "1", -0.0, 7])
def test_an_index_that_is_none_tells_nothing_apart(index: Any) -> None:
    asked = {"index": index, "message": {"content": "42"}, "finish_reason": "stop"}
    other = {"index": 1, "message": {"content": "another"}, "finish_reason": "stop"}
    assert parse(json.dumps({"choices": [asked]}).encode()).outcome == "ok"
    assert parse(json.dumps({"choices": [asked, other]}).encode()).outcome == "unknown"
    if index != 7:
        del other["index"]
        assert parse(json.dumps({"choices": [other, asked]}).encode()).outcome == "unknown"


CHUNK = {"index": 0, "delta": {"content": "b"}}
END = {"index": 0, "delta": {}, "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("chunk", "outcome", "text"),
    [
        ({"choices": [CHUNK]}, "ok", "abc"),
        ({"choices": CHUNK}, "ok", "abc"),
        (CHUNK, "ok", "abc"),
        ({"choices": [{"content": "b"}]}, "ok", "abc"),
        ({"choices": [{"delta": {"text": "b"}}]}, "ok", "abc"),
        ({"choices": [{"text": {"content": "b"}}]}, "ok", "abc"),
        ({"choices": [{"index": True, "delta": {"content": "b"}}]}, "ok", "abc"),
        ({"choices": str([CHUNK])}, "unknown", "ac"),
        ({"text": [CHUNK]}, "unknown", "ac"),
        ({"message": [CHUNK]}, "unknown", "ac"),
        ({"choices": [{"message": {"content": "b"}}]}, "unknown", "ac"),
        ({"choices": [{"message": {"content": "ac"}}]}, "ok", "ac"),
        ({"choices": [{"message": {"content": [{"type": "text", "text": "b"}]}}]}, "unknown", "ac"),
        ({"choices": [{"message": {"content": [{"type": "text", "text": "ac"}]}}]}, "ok", "ac"),
        ({"choices": [{"value": CHUNK}]}, "unknown", "ac"),
        ({"choices": [{"delta": {"value": {"content": "b"}}}]}, "unknown", "ac"),
        ({"choices": [{"index": 7, "delta": {"content": "b"}}]}, "unknown", "ac"),
        ([[{"choices": [CHUNK]}]], "unknown", "ac"),
    ],
)
def test_a_piece_of_a_stream_is_understood_or_the_answer_is_not_ok(
    chunk: object, outcome: str, text: str
) -> None:
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "a"}}]},
        chunk,
        {"choices": [{"index": 0, "delta": {"content": "c"}}]},
        {"choices": [END]},
    ]
    raw = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in chunks) + b"data: [DONE]\n\n"
    parsed = parse(raw)
    assert (parsed.outcome, parsed.text) == (outcome, text)


@pytest.mark.parametrize("name", ["delta", "content", "message"])
def test_two_answers_in_one_choice_are_ok_only_where_they_agree(name: str) -> None:
    for other, outcome in (("another", "unknown"), ("42", "ok")):
        holder = {"content": other} if name == "message" else other
        choice = {"text": "42", name: holder, "finish_reason": "stop"}
        assert parse(json.dumps({"choices": [choice]}).encode()).outcome == outcome


@pytest.mark.parametrize("member", ["choices", "message", "delta"])
@pytest.mark.parametrize("held", [[{"text": "another"}], {"content": "another"}, "another"])
def test_a_text_beside_another_answer_in_one_object_is_not_ok(member: str, held: Any) -> None:
    content = {"text": "model", member: held}
    for document in (
        {"candidates": [{"content": content, "finishReason": "stop"}]},
        {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"content": [content]}, "finish_reason": "stop"}]},
    ):
        assert parse(orjson.dumps(document)).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        ([{"reasoning": "a"}, {"reasoning": "b"}], Outcome.OK),
        (
            [{"reasoning": "a", "reasoning_content": "a"}, {"reasoning": "b", "reasoning_content": "b"}],
            Outcome.OK,
        ),
        ([{"reasoning": "a"}, {"reasoning_details": [{"type": "reasoning.encrypted"}]}], Outcome.OK),
        ([{"reasoning": "a"}, {"reasoning_content": ""}, {"reasoning": "b"}], Outcome.OK),
        ([{"thoughts": "a"}, {"thought": "b"}], Outcome.UNKNOWN),
        ([{"reasoning": "a"}, {"content": "4"}, {"reasoning_content": "b"}], Outcome.UNKNOWN),
    ],
)
def test_reasoning_that_moves_to_another_member_of_a_stream_is_not_ok(
    pieces: list[dict[str, Any]], outcome: Outcome
) -> None:
    assert parse(events(*pieces, {"content": "4"})).outcome is outcome


def test_an_answer_inside_a_part_without_text_is_not_ok() -> None:
    content = {"text": None, "delta": {"content": "is four."}}
    assert parse(events({"content": "The answer "}, {"content": content})).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("message", "text", "outcome"),
    [
        ({"role": "assistant", "thinking": "hm"}, "", Outcome.EMPTY),
        ({"role": "assistant"}, "", Outcome.EMPTY),
        ({"value": {"content": "4"}}, "five", Outcome.UNKNOWN),
        ({"id": "m1"}, "five", Outcome.UNKNOWN),
    ],
)
def test_a_text_beside_a_message_without_one_is_no_answer(
    message: dict[str, Any], text: str, outcome: Outcome
) -> None:
    """It was: the reasoning was lost, and a text from anywhere was `ok`."""
    parsed = parse(orjson.dumps({"message": message, "done_reason": "stop", "text": "five"}))
    assert (parsed.text or "", parsed.outcome) == (text, outcome)


def test_two_texts_in_one_part_are_not_ok() -> None:
    content = {"parts": [{"text": "42"}], "text": "model"}
    document = {"candidates": [{"content": content, "finishReason": "STOP"}]}
    assert parse(json.dumps(document).encode()).outcome == "unknown"


@pytest.mark.parametrize("member", ["message", "parts", "output_text"])
def test_a_bare_text_beside_a_list_that_is_not_understood_is_not_ok(member: str) -> None:
    document = {member: [{"content": "another"}], "content": "42", "done_reason": "stop"}
    assert parse(json.dumps(document).encode()).outcome == "unknown"
    assert parse(json.dumps({**document, member: None}).encode()).outcome == "ok"


@pytest.mark.parametrize("member", ["text", "message", "value", "parts", "output_text"])
def test_an_answer_elsewhere_in_the_message_is_not_ok(member: str) -> None:
    message = {"content": "a", member: "b"}
    document = {"choices": [{"message": message, "finish_reason": "stop"}]}
    assert parse(json.dumps(document).encode()).outcome == "unknown"


def test_an_object_in_place_of_text_may_hold_reasoning_too() -> None:
    content = {"role": "assistant", "content": "42", "thinking": "so"}
    document = {"message": {"content": content}, "done_reason": "stop"}
    parsed = parse(json.dumps(document).encode())
    assert (parsed.outcome, parsed.text, parsed.reasoning) == ("ok", "42", "so")


WHOLE = {"choices": [{"index": 0, "message": {"content": "The answer is 4."}, "finish_reason": "stop"}]}
PLAIN = orjson.dumps(WHOLE)


@pytest.mark.parametrize(
    "raw",
    [
        b": keep-alive\n\n: keep-alive\n\n" + PLAIN,
        b"\r\n:\r\n" + PLAIN,
        b"\x1e" + PLAIN + b"\n",
        b")]}',\n" + PLAIN,
        PLAIN + b"\n\ndata: [DONE]\n\n",
        PLAIN + b"\0\0\0",
        PLAIN + PLAIN,
        orjson.dumps(PLAIN.decode()),
        orjson.dumps({"statusCode": 200, "headers": {}, "body": PLAIN.decode()}),
    ],
    ids=range(9),
)
def test_what_lies_around_the_json_of_an_answer_loses_nothing(raw: bytes) -> None:
    assert is_complete(raw)
    parsed = parse(raw)
    assert (parsed.text, parsed.outcome) == ("The answer is 4.", Outcome.OK)


@pytest.mark.parametrize("rest", [b"<script>x</script>", b'{"half', b"Warning: out of memory", b"NaN"])
def test_an_answer_with_something_else_behind_it_is_kept_and_flagged(rest: bytes) -> None:
    parsed = parse(PLAIN + rest)
    assert (parsed.text, parsed.outcome) == ("The answer is 4.", Outcome.UNKNOWN)


def json_lines(*texts: str) -> bytes:
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    return b"\n".join(map(orjson.dumps, chunks))


def test_the_rest_of_a_json_line_is_no_comment_before_an_answer() -> None:
    cut = json_lines("The ", "answer").partition(b'"content"')[2] + b"\n" + PLAIN
    assert cut.startswith(b":")
    with pytest.raises(ConnectionBroken):
        parse(cut)


@pytest.mark.parametrize("texts", [("The ", "answer"), ("The ", "answer ", "is")])
def test_json_lines_that_end_in_the_middle_of_one_are_a_broken_connection(texts: tuple[str, ...]) -> None:
    whole = json_lines(*texts) + b'\n{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}'
    assert is_complete(whole)
    assert not is_complete(whole[:-5])
    with pytest.raises(ConnectionBroken):
        parse(whole[:-5])


def ollama_lines(*texts: str, **last: Any) -> list[bytes]:
    """Lines of Ollama's own stream; those of `last` are added to the last one."""
    lines = [{"model": "m", "message": {"content": text}, "done": False} for text in texts]
    return [orjson.dumps(line) + b"\n" for line in [*lines[:-1], lines[-1] | last]]


END = {"done": True, "done_reason": "stop"}


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_json_lines_that_end_between_two_are_a_broken_connection_as_events_are(lines: int) -> None:
    whole = ollama_lines("The ", "answer ", "is", " 4.", **END)
    assert parse(b"".join(whole)).outcome is Outcome.OK
    assert is_complete(b"".join(whole))
    chunks = json_lines("The ", "answer ", "is").splitlines(keepends=True)
    for cut in (b"".join(whole[:lines]), b"".join(whole[:lines]).rstrip(), b"".join(chunks[:lines])):
        assert not is_complete(cut)
        with pytest.raises(ConnectionBroken) as broken:
            parse(cut)
        assert broken.value.maybe_billed
        assert broken.value.raw == cut


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        (b"".join(ollama_lines("four", done=True)), Outcome.UNKNOWN),  # Ollama before it gave a reason
        (b"".join(ollama_lines("fo", "ur", done=True)), Outcome.UNKNOWN),
        (json_lines("fo", "ur") + b"\n[DONE]", Outcome.UNKNOWN),
        (json_lines("fo", "ur") + b'\n{"usage": {"completion_tokens": 2}}', Outcome.UNKNOWN),
        (b"".join(ollama_lines("fo", "ur", done=True, done_reason="length")), Outcome.TRUNCATED),
    ],
)
def test_json_lines_with_an_end_mark_and_no_reason_are_kept(raw: bytes, outcome: Outcome) -> None:
    parsed = parse(raw)
    assert (parsed.text, parsed.outcome) == ("four", outcome)


@pytest.mark.parametrize(
    "raw",
    [
        b": keep-alive\r\n\r\n" * 11 + b"data: " + PLAIN + b"\r\n\r\n",
        b"\n" * 1_000_000 + PLAIN,
        b"\n" * 1_000_000 + b"<html>",
        PLAIN + b"\0" * 1_000_000 + b"x",
        PLAIN + b"\n" * 1_000_000 + b"x",
    ],
    ids=range(5),
)
def test_padding_costs_time_and_memory_in_proportion_to_its_bytes(raw: bytes) -> None:
    started = time.process_time()
    tracemalloc.start()
    try:
        with contextlib.suppress(BrokenAnswer):
            assert parse(raw).text == "The answer is 4."
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 2
    assert peak < 20 * len(raw) + 1_000_000


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"statusCode": 429, "body": '{"message": "Too Many Requests"}'}, RateLimited),
        ({"statusCode": 500, "body": "Internal Server Error"}, TeacherUnavailable),
        ({"message": "Too Many Requests"}, RateLimited),
        ({"errorMessage": "Task timed out after 30.00 seconds", "errorType": "Sandbox"}, TeacherUnavailable),
        ({"msg": "invalid api key"}, TeacherRefused),
        ({"message": "Forbidden by the stars"}, BrokenAnswer),
    ],
)
def test_an_error_told_in_words_or_by_a_number_alone(
    document: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        parse(orjson.dumps(document))
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "error", ["nil", "<nil>", "No error", {"code": None, "message": "ok"}, {"msg": "nil"}]
)
def test_an_error_member_that_says_that_there_is_none(error: Any) -> None:
    assert parse(orjson.dumps({**WHOLE, "error": error})).outcome is Outcome.OK


def lines_without_blank_ones(*texts: str, end: bytes = b"data: [DONE]\n") -> bytes:
    return (
        events(*({"content": text} for text in texts)).replace(b"\n\n", b"\n").partition(b"data: [DONE]")[0]
        + end
    )


@pytest.mark.parametrize("end", [b"data: [DONE]\n", b"data: [DONE]", b""])
def test_events_without_blank_lines_between_them(end: bytes) -> None:
    parsed = parse(lines_without_blank_ones("The answer ", "is 4.", end=end))
    assert (parsed.text, parsed.outcome) == ("The answer is 4.", Outcome.OK)


def test_one_event_over_several_lines_is_one_event() -> None:
    chunk = json.dumps(
        {"choices": [{"index": 0, "delta": {"content": "4"}, "finish_reason": "stop"}]}, indent=1
    )
    parsed = parse("".join(f"data: {line}\n" for line in chunk.split("\n")).encode() + b"\n")
    assert (parsed.text, parsed.outcome) == ("4", Outcome.OK)


def test_an_event_with_the_name_of_an_end_ends_a_stream() -> None:
    parsed = parse(events({"content": "4"}, finish=None, done=False) + b"event: done\n\n")
    assert (parsed.text, parsed.outcome) == ("4", Outcome.UNKNOWN)  # no finish word
    named = parse(b"event: error\n\n" + events({"content": "4"}))
    assert (named.text, named.outcome) == ("4", Outcome.OK)  # a blank line ends an event without data


def test_a_chunk_that_is_an_error_itself_is_quoted() -> None:
    raw = events({"content": "The "}, finish=None, done=False)
    with pytest.raises(TeacherUnavailable, match="model crashed"):
        parse(raw + b'data: {"message": "model crashed", "code": 500}\n\n')


SENTENCE = "The answer is four."


@pytest.mark.parametrize(
    ("pieces", "text", "outcome"),
    [
        # Each delta holds all text so far.
        (("The answer", "The answer is", SENTENCE), SENTENCE, Outcome.OK),
        (("The", "The", "The answer", SENTENCE, SENTENCE), SENTENCE, Outcome.OK),
        (("", "The answer", SENTENCE), f"The answer{SENTENCE}", Outcome.UNKNOWN),
        # The last one holds all of it again.
        (("The ", "answer ", "is four.", SENTENCE), SENTENCE, Outcome.OK),
        (("The answer ", "is four.", SENTENCE), SENTENCE * 2, Outcome.UNKNOWN),
        # Short ones: where text could be meant, it is not clear.
        (("Y", "Ye", "Yes"), "Yes", Outcome.OK),
        (("Yes", "Yes."), "YesYes.", Outcome.UNKNOWN),
        (("Y", "es", "Yes"), "YesYes", Outcome.UNKNOWN),
        (("1", "10", "100"), "110100", Outcome.UNKNOWN),
        (("ha", "haha", "hahaha", "hahahahahaha"), "ha" * 12, Outcome.UNKNOWN),
        # Text that repeats itself.
        (("1", "1"), "11", Outcome.OK),
        (("1", "1", "0"), "110", Outcome.OK),
        (("\n", "\n\nThe answer is four."), "\n\n\nThe answer is four.", Outcome.OK),
        ((" ", "  ", "    "), " " * 7, Outcome.EMPTY),
        (("no ", "no ", "no "), "no no no ", Outcome.OK),
        ((SENTENCE, SENTENCE), SENTENCE * 2, Outcome.OK),
        (tuple("112233"), "112233", Outcome.OK),
        (
            ("No\n", "No\n", "Yes\n", "Yes\n", "Maybe\n", "Maybe\n"),
            "No\nNo\nYes\nYes\nMaybe\nMaybe\n",
            Outcome.UNKNOWN,  # of pairs, and long: a gateway may have sent each piece twice
        ),
    ],
)
def test_a_stream_that_repeats_itself(pieces: tuple[str, ...], text: str, outcome: Outcome) -> None:
    parsed = parse(events(*({"content": piece} for piece in pieces)))
    assert (parsed.text, parsed.outcome) == (text, outcome)


def with_logprobs(pieces: list[tuple[str, list[str]]], holder: str) -> bytes:
    """Events of these texts, each with the log-probabilities of these tokens."""
    lines = []
    for piece, tokens in pieces:
        listed = [{"token": token, "logprob": -float(at)} for at, token in enumerate(tokens)]
        choice = {holder: {"content": piece}, "logprobs": {"content": listed} if tokens else None}
        lines.append(b"data: " + orjson.dumps({"choices": [{"index": 0, **choice}]}) + b"\n\n")
    return b"".join(lines) + b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'


def twice(raw: bytes, *, id_of_each: bool = False) -> bytes:
    """A stream with each event two times, the second with another `id` or the same to the byte."""
    doubled = []
    for event in raw.split(b"\n\n")[:-1]:
        again = event.replace(b'{"choices"', b'{"id": "2", "choices"') if id_of_each else event
        doubled += [event, again]
    return b"".join(event + b"\n\n" for event in doubled)


PIECES = ("The ", "answer ", "is ", "four.")
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'


@pytest.mark.parametrize("id_of_each", [False, True])
@pytest.mark.parametrize("rest", [b"", b"data: [DONE]\n\n" * 2, USAGE, USAGE * 2 + b"data: [DONE]\n\n"])
def test_events_that_all_come_twice_are_read_once(rest: bytes, id_of_each: bool) -> None:
    """A gateway sends everything twice, also the finish reason, but not always what follows it."""
    pieces = [(piece, [piece]) for piece in ("The ", "answer ", "is ", "11", "11")]
    parsed = parse(twice(with_logprobs(pieces, "delta"), id_of_each=id_of_each) + rest)
    assert (parsed.text, parsed.outcome) == ("The answer is 1111", Outcome.OK)
    assert [token.token for token in parsed.logprobs] == [piece for piece, _ in pieces]
    whole = {"choices": [{"index": 0, "delta": {"content": SENTENCE}, "finish_reason": "stop"}]}
    parsed = parse(twice(b"data: " + orjson.dumps(whole) + b"\n\n", id_of_each=id_of_each) + rest)
    assert (parsed.text, parsed.outcome) == (SENTENCE, Outcome.OK)
    growing = events({"content": "The"}, {"content": "The answer"}, {"content": SENTENCE}, done=False)
    parsed = parse(twice(growing, id_of_each=id_of_each) + rest)
    assert (parsed.text, parsed.outcome) == (SENTENCE, Outcome.OK)


def test_a_gateway_that_ends_every_event_and_sends_it_twice_is_read_once() -> None:
    chunks = [{"choices": [{"index": 0, "delta": {"content": p}, "finish_reason": "stop"}]} for p in PIECES]
    once = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks)
    for raw in (once, twice(once), twice(once) + USAGE, twice(once, id_of_each=True)):
        parsed = parse(raw)
        assert (parsed.text, parsed.outcome) == (SENTENCE, Outcome.OK)
    laughs = [{**chunks[0], "choices": [{**chunks[0]["choices"][0], "delta": {"content": "ha"}}]}] * 2
    raw = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in [*laughs, *chunks])
    parsed = parse(raw)
    assert (parsed.text, parsed.outcome) == ("haha" + SENTENCE, Outcome.OK)


def test_pieces_in_pairs_are_halved_only_where_it_is_clear() -> None:
    """A server may repeat the finish reason beside the usage, and a gateway may send it once."""
    ended_twice = {
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3},
    }
    zeros = events(*[{"content": "0"}] * 32, done=False) + b"data: " + orjson.dumps(ended_twice) + b"\n\n"
    parsed = parse(zeros)
    assert (parsed.text, parsed.outcome) == ("0" * 32, Outcome.UNKNOWN)
    parsed = parse(events(*({"content": piece} for piece in PIECES for _ in range(2))))
    assert (parsed.text, parsed.outcome) == ("".join(p * 2 for p in PIECES), Outcome.UNKNOWN)
    parsed = parse(events(*({"content": piece} for piece in "112233")))
    assert (parsed.text, parsed.outcome) == ("112233", Outcome.OK)


def test_short_texts_whose_events_all_come_twice_are_not_clear() -> None:
    """A server that ends every answer twice may have meant "1122"."""
    for id_of_each in (False, True):
        parsed = parse(twice(with_logprobs([("1", ["1"]), ("2", ["2"])], "delta"), id_of_each=id_of_each))
        assert parsed.outcome is Outcome.UNKNOWN
    parsed = parse(
        events({"content": "1"}, {"content": "1"}, {"content": "2"}, {"content": "2"}, finish=None)
    )
    assert (parsed.text, parsed.outcome) == ("1122", Outcome.UNKNOWN)  # no finish reason


def test_a_tool_call_whose_events_all_come_twice_is_read_once() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "add", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"a": ', "1", "1", "}")]
    parsed = parse(twice(events(*({"tool_calls": [each]} for each in (call, *more)))))
    assert parsed.outcome is Outcome.TOOL_CALL
    assert orjson.loads(parsed.tool_calls_json or "[]")[0]["function"]["arguments"] == '{"a": 11}'
    # Digits that repeat before one finish reason are text.
    parsed = parse(with_logprobs([("7", ["7"])] * 2 + [("8", ["8"])] * 2, "delta"))
    assert (parsed.text, parsed.outcome, len(parsed.logprobs)) == ("7788", Outcome.OK, 4)


GROWING = ["The", "The answer is", SENTENCE]
TOKENS = [["The"], [" answer", " is"], [" four", "."]]
ALL = [token for tokens in TOKENS for token in tokens]


@pytest.mark.parametrize("holder", ["delta", "message"])
@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        (TOKENS, ALL),  # each those of its new text
        ([ALL[:1], ALL[:3], ALL], ALL),  # each those of all text so far
        ([[], [], ALL], ALL),
        ([ALL[:1], [], ALL[3:]], []),  # some are missing
        ([ALL[:1], ALL, ALL], ALL),
        ([[], [], []], []),
    ],
)
def test_log_probabilities_of_text_that_grows_are_those_of_the_stored_text(
    holder: str, tokens: list[list[str]], kept: list[str]
) -> None:
    parsed = parse(with_logprobs(list(zip(GROWING, tokens, strict=True)), holder))
    assert (parsed.text, parsed.outcome) == (SENTENCE, Outcome.OK)
    assert [token.token for token in parsed.logprobs] == kept


@pytest.mark.parametrize("last", [ALL, [], ["The answer"]])
def test_log_probabilities_of_a_last_delta_that_repeats_all_are_not_counted_twice(last: list[str]) -> None:
    pieces = ["The", " answer is", " four.", SENTENCE]
    parsed = parse(with_logprobs(list(zip(pieces, [*TOKENS, last], strict=True)), "delta"))
    assert (parsed.text, parsed.outcome) == (SENTENCE, Outcome.OK)
    assert [token.token for token in parsed.logprobs] == ALL


@pytest.mark.parametrize(
    ("word", "outcome"),
    [
        ("content_filter: PROHIBITED_CONTENT", Outcome.FILTERED),
        ("stop: length", Outcome.TRUNCATED),
        ("stop: four", Outcome.OK),
        ("four: five", Outcome.UNKNOWN),
        ("maxPredictedTokensReached", Outcome.TRUNCATED),
        ("eosFound", Outcome.OK),
    ],
)
def test_finish_words_with_a_detail_and_of_local_servers(word: str, outcome: Outcome) -> None:
    assert parse(body({"content": "4"}, word)).outcome is outcome


@pytest.mark.parametrize("word", ["null", "None", "FINISH_REASON_UNSPECIFIED", "NOT_FINISHED"])
def test_a_word_that_says_that_an_answer_goes_on_ends_none(word: str) -> None:
    cut = events({"content": "The "}, finish=None, done=False)
    cut = cut.replace(b'"delta"', b'"finish_reason":"%s","delta"' % word.encode())
    assert word.encode() in cut
    with pytest.raises(ConnectionBroken):
        parse(cut)
    assert parse(body({"content": "4"}, word)).finish_reason == ""


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": [{"delta": None, "text": "4"}]},
        {"choices": [{"delta": {}, "message": {"role": "assistant", "content": "4"}}]},
        {"model": "m", "done": False, "message": {"role": "assistant", "content": "4"}, "eval_count": 3},
    ],
    ids=["legacy", "both", "counted"],
)
def test_a_whole_body_is_no_piece_of_a_stream_though_it_names_one(reply: dict[str, Any]) -> None:
    assert parse(json.dumps(reply).encode()).text == "4"


@pytest.mark.parametrize(
    "content", [{"text": "good", "score": 5}, [{"text": "a", "label": 1}], {"content": "x", "title": "y"}]
)
def test_an_object_with_members_of_its_own_is_not_its_text_alone(content: Any) -> None:
    assert parse(body({"content": content})).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    "more",
    [
        {"function_call": {"name": "", "arguments": ""}},
        {"tool_calls": [{"id": "", "type": "function", "function": {"name": "", "arguments": ""}}]},
        {"tool_calls": [{}]},
        {"refusal": False},
        {"refusal": {}},
        {"refusal": " "},
    ],
    ids=range(6),
)
def test_members_that_hold_nothing_say_nothing(more: dict[str, Any]) -> None:
    parsed = parse(body({"content": "4", **more}))
    assert (parsed.text, parsed.outcome, parsed.tool_calls_json, parsed.refusal) == (
        "4",
        Outcome.OK,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("It is 4.<|im_end|>", "It is 4."),
        ("It is 4.\n<|eot_id|>\n", "It is 4."),
        ("It is 4.</s></s>", "It is 4."),
        ("<|channel|>final<|message|>It is 4.<|return|>", "It is 4."),
        ("<|start|>assistant<|channel|>final<|message|>It is 4.<|end|>", "It is 4."),
        ("<|im_start|>assistant\nIt is 4.<|im_end|>", "It is 4."),
        ("<|channel>thought\nWe add.<channel|>It is 4.<turn|>", "It is 4."),
        # These are text.
        ("The turn ends with <|im_end|>", "The turn ends with <|im_end|>"),
        ("Write `<|im_start|>user` first.", "Write `<|im_start|>user` first."),
        ("<s>5</s> 4 <s>6</s>", "<s>5</s> 4 <s>6</s>"),
        ("5</s> 4 6</s>", "5</s> 4 6</s>"),
        ('It is <s class="old">5</s>', 'It is <s class="old">5</s>'),
        ("It is <S>5</s>", "It is <S>5</s>"),
        (
            "A turn begins with <|im_start|>, then the role.",
            "A turn begins with <|im_start|>, then the role.",
        ),
    ],
)
def test_marks_of_a_chat_template_are_taken_off(given: str, text: str) -> None:
    parsed = parse(body({"content": given}))
    assert (parsed.text, parsed.outcome) == (text, Outcome.OK)


@pytest.mark.parametrize("mark", turn_marks.END_MARKS)
def test_every_end_mark_is_taken_off(mark: str) -> None:
    assert turn_marks.without_marks(f"It is 4.{mark}") == ("It is 4.", True)


@pytest.mark.parametrize("mark", turn_marks.OPENING_MARKS)
def test_every_opening_mark_is_taken_off(mark: str) -> None:
    assert turn_marks.without_marks(f"{mark}It is 4.") == ("It is 4.", True)


def test_an_answer_that_goes_on_with_a_further_turn_is_flagged() -> None:
    for text in ("It is 4.<|im_end|>\n<|im_start|>user\nAnd 5?", "4<start_of_turn>user\nAnd 5?"):
        assert parse(body({"content": text})).outcome is Outcome.UNKNOWN


def test_marks_take_no_time_that_grows_with_their_square() -> None:
    started = time.perf_counter()
    for text in ("a" + "</s>" * 200_000, "<|im_start|>assistant" * 50_000, " \n" * 400_000 + "</s>x"):
        parse(body({"content": text}))
    assert time.perf_counter() - started < 20

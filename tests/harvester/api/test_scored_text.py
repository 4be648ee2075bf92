"""Test that tokens of a reply are found in the text that was sent, and what is refused as no proof."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.scoring.replies import parse_scored
from harvester.api.scoring.request_forms import (
    PATHS,
    WAYS,
    body_of,
    listed_of,
    offered_by_prompt,
    probe_line,
    url_of,
    way_of,
)
from harvester.api.scoring.spelling import find_end, spell
from harvester.api.types import Outcome
from harvester.errors import TeacherError
from harvester.prompts.reader import to_prompt


def prompt_of(**line):
    return to_prompt(line, file="a.jsonl", line=1)


# Characters of every length in UTF-8, and U+FFFD, which stands in a text as it does for a lost part.
LOSSY = st.text("a é漢😀\ufffd", min_size=1, max_size=6)


@given(st.lists(st.text(min_size=1, max_size=6) | LOSSY, min_size=1, max_size=12), st.data())
def test_tokens_spell_their_text_however_lossily_they_arrive(words, data):
    raw = "".join(words).encode("utf-8", "replace")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)) | {0, len(raw)})
    tokens = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    pieces = [token.decode(errors="replace") for token in tokens]
    spans = spell(pieces, raw)
    if spans is None:  # a run that can't be told apart from its neighbours is refused, not guessed
        assert any("�" in piece for piece in pieces)
        return
    assert b"".join(raw[start:stop] for _, _, start, stop in spans) == raw
    assert [first for first, *_ in spans] == [0, *(end for _, end, *_ in spans[:-1])]
    assert spans[-1][1] == len(pieces)


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["a", "b"], "ab", [(0, 1), (1, 2)]),
        (["<s>", "a", "b"], "ab", [(1, 2), (2, 3)]),
        (["", "user"], "<|im_start|>user", [(0, 1), (1, 2)]),
        (["", "a", "a"], "aa", [(1, 2), (2, 3)]),
        (["Hello", "world"], "Hello world", [(0, 1), (1, 2)]),
        (["▁Hello", "▁world"], " Hello world", [(0, 1), (1, 2)]),
        (["Hello", "Ġworld"], "Hello world", [(0, 1), (1, 2)]),
        (["a", "�", "�", "b"], "aéb", [(0, 1), (1, 3), (3, 4)]),
        (["a", " �", "�"], "a é", [(0, 1), (1, 3)]),
        (["�", "�"], "�", [(0, 2)]),
        (["a�", "��"], "a�", [(0, 2)]),
        (["a", "�", "b"], "a�b", [(0, 1), (1, 2), (2, 3)]),
        (["a", "", "b"], "a<|end|>b", [(0, 1), (1, 2), (2, 3)]),
        (["a", "c"], "ab", None),
        (["a"], "ab", None),
        (["a", "b", "c"], "ab", None),
    ],
)
def test_spelling(pieces, text, expected):
    spans = spell(pieces, text.encode())
    assert (None if spans is None else [span[:2] for span in spans]) == expected


def test_the_last_place_of_an_answer_counts():
    pieces = ["<u>", "42", "<a>", "42", "<end>"]
    assert find_end(pieces, b"42") == [(3, 4, 0, 2)]
    assert find_end(pieces, b"43") is None


def test_every_way_has_a_body_that_is_recognised_and_no_answer_has():
    line = prompt_of(
        messages=[{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}], text="<u>2?<a>2"
    )
    for way in WAYS:
        assert way_of(body_of(way, "m", line, {})) == way
        assert way_of(body_of(way, "m", prompt_of(**probe_line(way)), {"top_k": 1})) == way
        with pytest.raises(ValueError, match="needs"):
            body_of(way, "m", prompt_of(messages=[{"role": "user", "content": [{"type": "text"}]}]), {})
    assert offered_by_prompt(line) == WAYS
    assert way_of({"messages": [], "model": "m", "prompt_logprobs": 1}) is None
    assert url_of("http://h:1/v1", PATHS["generate"]) == "http://h:1/generate"
    assert url_of("http://h:1/v1", PATHS["echo"]) == "http://h:1/v1/completions"


ECHO = body_of("echo", "m", prompt_of(prompt="abé."), {})


def echoed(tokens, values, **document):
    lists = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None}
    return json.dumps({"choices": [{"text": "abé.", "logprobs": lists}], **document}).encode()


def test_tokens_that_arrive_in_parts_are_one_with_their_sum():
    usage = {"prompt_tokens": 5, "completion_tokens": 1}
    raw = echoed(["a", "b", "�", "�", ".", " x"], [None, -0.5, -1.0, -2.0, -0.25, -9.0], usage=usage)
    parsed = parse_scored(raw, ECHO)
    assert parsed.outcome is Outcome.SCORED
    assert [(t.data, t.logprob) for t in parsed.logprobs] == [
        (b"a", None),
        (b"b", -0.5),
        ("é".encode(), -3.0),
        (b".", -0.25),
    ]
    assert (parsed.usage.input_tokens, parsed.usage.output_tokens) == (5, 1)


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        ([" x"], [-1.0]),  # the fields were ignored: only what was generated
        (["a", "b", "é", "."], [None, -1.0, None, -1.0]),
        (["a", "b", "é", "."], [None, -1.0, -1.0]),
        (["a", "b", "é"], [None, -1.0, -1.0]),
        (["a", "b", "é", ".", "x", "y"], [None, -1.0, -1.0, -1.0, -1.0, -1.0]),
        (["a", "b", "é", "."], [None, -1.0, 0.7, -1.0]),
        (["a", "b", "é", "."], [None, -1.0, "-1", -1.0]),
        ([], []),
    ],
)
def test_what_does_not_prove_itself_is_unscored(tokens, values):
    assert parse_scored(echoed(tokens, values), ECHO).outcome is Outcome.UNSCORED


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "reply", [{}, {"choices": []}, {"choices": [3]}, {"meta_info": []}, {"prompt_logprobs": 3}]
)
def test_replies_of_another_shape_are_unscored(way, reply):
    body = body_of(way, "m", prompt_of(**probe_line(way)), {})
    assert parse_scored(json.dumps(reply).encode(), body).outcome is Outcome.UNSCORED


def test_several_likeliest_tokens_are_asked_for_only_on_request():
    line = prompt_of(
        messages=[{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}], text="<u>2?<a>2"
    )
    names = {"prompt_logprobs": "prompt_logprobs", "chat": "prompt_logprobs", "echo": "logprobs"}
    for way in WAYS:
        plain, several = body_of(way, "m", line, {}), body_of(way, "m", line, {}, 5)
        name = names.get(way, "top_logprobs_num")
        assert plain.get(name) == (None if way == "generate" else 1)
        assert {**plain, name: 5} == several
        assert (listed_of(plain), listed_of(several)) == (0, 5)


def reply_of(way, pieces, values, tops):
    """A reply whose tokens have these alternatives: lists of (text, log-probability)."""
    if way == "echo":
        lists = {"tokens": pieces, "token_logprobs": values, "top_logprobs": [t and dict(t) for t in tops]}
        return {"choices": [{"logprobs": lists}]}
    if way == "generate":
        triples = [[value, 7, piece] for piece, value in zip(pieces, values, strict=True)]
        others = [top and [[value, 7, piece] for piece, value in top] for top in tops]
        return {"meta_info": {"input_token_logprobs": triples, "input_top_logprobs": others}}
    rows = [
        top and {str(n): {"decoded_token": piece, "logprob": value} for n, (piece, value) in enumerate(top)}
        for top in tops
    ]
    return {"choices": [{"prompt_logprobs": rows}]}


@pytest.mark.parametrize("way", ["echo", "generate", "prompt_logprobs"])
def test_the_likeliest_tokens_are_kept_where_they_were_asked_for(way):
    pieces, values = ["a", "b", "\ufffd", "\ufffd", "."], [None, -0.5, -1.0, -2.0, -0.25]
    tops = [None, [("b", -0.5), ("c", -1.5)], *([(p, -1.0), ("x", -9)] for p in pieces[2:4])]
    tops.append([(".", -0.25), ("\ufffd", -2.0), ("!", math.nan), ("?", "-1")])
    if way == "prompt_logprobs":
        pieces, tops = ["b", *pieces[2:]], [None, *tops[1:]]
        text = "bé."
    else:
        text = "abé."
    raw = json.dumps(reply_of(way, pieces, values[-len(pieces) :], tops)).encode()
    tokens = parse_scored(raw, body_of(way, "m", prompt_of(prompt=text), {}, 4)).logprobs
    kept = {t.data: [(o.token, o.data, o.logprob) for o in t.top] for t in tokens}
    assert kept[b"b"] == [("b", b"b", -0.5), ("c", b"c", -1.5)]
    assert kept["é".encode()] == []  # it arrived in parts
    assert kept[b"."] == [(".", b".", -0.25), ("\ufffd", None, -2.0)]
    plain = parse_scored(raw, body_of(way, "m", prompt_of(prompt=text), {})).logprobs
    assert [t.top for t in plain] == [()] * len(tokens)
    assert [(t.data, t.logprob) for t in plain] == [(t.data, t.logprob) for t in tokens]


def test_an_error_in_a_200_is_raised():
    raw = json.dumps({"error": {"message": "no such field", "code": 400}}).encode()
    with pytest.raises(TeacherError, match="no such field"):
        parse_scored(raw, ECHO)


def test_a_chats_answer_and_what_follows_it_are_kept():
    turns = [{"role": "user", "content": "42?"}, {"role": "assistant", "content": "42"}]
    body = body_of("chat", "m", prompt_of(messages=turns), {})
    pieces = ["<u>", "42", "?", "<a>", "4", "2", "<end>", "\n"]
    entries = [{str(at): {"logprob": -float(at), "decoded_token": p}} for at, p in enumerate(pieces)]
    rows = [None, *entries[1:]]
    parsed = parse_scored(json.dumps({"prompt_logprobs": rows, "choices": []}).encode(), body)
    assert parsed.outcome is Outcome.SCORED
    assert parsed.text == "42"
    assert [(t.data, t.logprob) for t in parsed.logprobs] == [
        (b"4", -4.0),
        (b"2", -5.0),
        (b"<end>", -6.0),
        (b"\n", -7.0),
    ]
    assert math.isfinite(sum(t.logprob for t in parsed.logprobs))

"""Request keys: RFC 8785, golden vectors, what changes a key and what does not."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from enum import Enum
from pathlib import Path

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.api.request_key import RequestKeys, canonical, owner, request_key

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keys.json").read_text(encoding="utf-8"))
URL = "http://127.0.0.1:8000/v1"
BODY = {
    "model": "mock-teacher",
    "messages": [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Was ist 2 + 3? \u00e4\U0001f600"},
    ],
    "temperature": 0.7,
    "max_tokens": 64,
}

SAFE = 2**53 - 1
texts = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates and controls included
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-SAFE - 2, SAFE + 2)
    | st.floats()
    | texts
    | st.sampled_from([1e21, 1e20, 1e-6, 1e-7, -0.0, 5e-324, 0.1 + 0.2, 333333333.33333329])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def reference(value: object) -> bytes | None:
    try:
        return rfc8785.dumps(value)
    except ValueError:
        return None


def ours(value: object) -> bytes | None:
    try:
        return canonical(value)
    except ValueError:
        return None


@settings(max_examples=400, deadline=None)
@given(values)
def test_the_fast_path_equals_the_reference_on_everything(value):
    assert ours(value) == reference(value)


def test_names_sort_by_utf16_unit_as_in_the_standard():
    document = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert list(json.loads(canonical(document))) == [
        "\r",
        "1",
        "\u0080",
        "\u00f6",
        "\u20ac",
        "\U0001f600",
        "\ufb33",
    ]


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, "\ud800", {"\udfff": 1}, 2**53, {1: 2}, {"a": object()}, b"bytes", Colour.RED],
    ids=lambda value: repr(value).split(" object at")[0],
)
def test_what_json_can_not_hold_is_refused_with_a_plain_error(value):
    with pytest.raises(ValueError, match="no canonical JSON") as caught:
        canonical({"body": [value]})
    assert type(caught.value) is ValueError


def test_deep_nesting_is_an_error_not_a_crash():
    deep: object = "x"
    for _ in range(300):
        deep = [deep]
    assert canonical(deep) == b"[" * 300 + b'"x"' + b"]" * 300
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deep"):
        canonical(deep)


@pytest.mark.parametrize("vector", GOLDEN, ids=lambda v: v["name"])
def test_golden_vectors(vector):
    document = vector["canonical"].encode()
    key = request_key(vector["endpoint"], vector["body"], vector["sample"], vector["epoch"])
    assert key.hex() == vector["key"] == hashlib.sha256(document).hexdigest()
    shared = {name: value for name, value in vector["body"].items() if name != "messages"}
    quick = RequestKeys(vector["endpoint"], shared, vector["epoch"])
    assert quick.key(vector["body"]["messages"], vector["sample"]) == key


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12), st.integers(0, 9) | st.floats(0, 2) | st.text(max_size=5), max_size=6
    ),
    st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=20)}), max_size=3),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_keys_of_many_requests_equal_keys_of_one(shared, messages, sample_index, epoch):
    shared.pop("messages", None)
    body = {**shared, "messages": messages}
    quick = RequestKeys(URL, shared, epoch)
    assert quick.key(tuple(messages), sample_index) == request_key(URL, body, sample_index, epoch)


def test_whatever_changes_the_question_changes_the_key():
    sent = [
        (URL, BODY, 0, 0),
        ("http://127.0.0.1:8001/v1", BODY, 0, 0),
        (URL, BODY, 1, 0),
        (URL, BODY, 0, 1),
        (URL, {**BODY, "model": "other"}, 0, 0),
        (URL, {**BODY, "messages": BODY["messages"][1:]}, 0, 0),
        (URL, {**BODY, "temperature": 0.70001}, 0, 0),
        (URL, {**BODY, "max_tokens": 65}, 0, 0),
        (URL, {**BODY, "seed": None}, 0, 0),  # null is not the same as absent
        (URL, {**BODY, "seed": 1}, 0, 0),
        (URL, {**BODY, "seed": True}, 0, 0),
        (URL, {**BODY, "seed": "1"}, 0, 0),
    ]
    assert len({request_key(*each) for each in sent}) == len(sent)
    composed = {**BODY, "stop": ["\u00e9"]}
    assert request_key(URL, composed, 0) != request_key(URL, {**BODY, "stop": ["e\u0301"]}, 0)


def test_nothing_else_changes_the_key():
    key = request_key(URL, BODY, 0)
    assert request_key(URL, dict(reversed(BODY.items())), 0) == key
    assert request_key(URL, {**BODY, "stream": True, "stream_options": {"include_usage": True}}, 0) == key
    assert request_key(URL, {**BODY, "messages": tuple(BODY["messages"])}, 0) == key
    assert request_key(URL, {**BODY, "max_tokens": 64.0}, 0) == key  # JSON knows one kind of number
    assert len(key) == 32


@pytest.mark.parametrize(("sample_index", "epoch"), [(-1, 0), (0, -1)])
def test_numbers_below_zero_are_refused(sample_index, epoch):
    with pytest.raises(ValueError, match="count from 0"):
        request_key(URL, BODY, sample_index, epoch)
    with pytest.raises(ValueError, match="count from 0"):
        RequestKeys(URL, {}, epoch).key([], sample_index)


def test_every_key_has_one_owner_and_ranks_share_evenly():
    keys = [request_key(URL, BODY, index) for index in range(4000)]
    shares = Counter(owner(key, 4) for key in keys)
    assert set(shares) == {0, 1, 2, 3}
    assert min(shares.values()) > 850
    assert owner(bytes.fromhex("00000000000000ff" + "00" * 24), 10) == 5
    assert owner(keys[0], 1) == 0
    with pytest.raises(ValueError, match="at least one rank"):
        owner(keys[0], 0)

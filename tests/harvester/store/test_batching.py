"""Test answers with log-probabilities: memory per answer, not per store; checks that don't parse them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.replies import completion
from harvester.api.replies.model_name import model_and_provider
from harvester.errors import TeacherError
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.store.shards import batching
from harvester.store.shards.schema import to_table
from harvester.store.shards.seal import seal
from harvester.terms import lineage
from tests.harvester.store_rows import answer, intent, open_store, raw_of

ROWS = 12
KIB = 1024


def heavy_raw(number: int, tokens: int = 30, top: int = 20) -> bytes:
    """An answer of which almost everything is log-probabilities, about 45 KiB."""

    def token(at: int) -> dict[str, Any]:
        return {"token": f" t{at}", "bytes": list(f" t{at}".encode()), "logprob": -0.25 * (at % 7)}

    content = [
        {**token(at), "top_logprobs": [token(at + entry) for entry in range(top)]} for at in range(tokens)
    ]
    document = json.loads(raw_of(number))
    document["choices"][0]["logprobs"] = {"content": content}
    return json.dumps(document).encode()


def make(store: Path) -> None:
    with open_store(store) as journal:
        journal.apply([intent(number) for number in range(ROWS)])
        journal.apply([answer(number, raw=heavy_raw(number)) for number in range(ROWS)])


def peak_kib(act: Callable[[], object]) -> float:
    """The most that Python objects took while it ran."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1] / KIB
    finally:
        tracemalloc.stop()


def test_reading_sealing_and_asking_take_memory_for_a_few_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BYTES", 64 * KIB)  # two answers
    make(tmp_path)
    to_table([])  # what Arrow imports at its first table is not ours to count
    corpus = Corpus.open(tmp_path)
    one_answer_kib = peak_kib(lambda: next(corpus.samples()))
    allowed = one_answer_kib * 3
    everything = list(corpus.samples())
    assert peak_kib(lambda: list(corpus.samples())) > allowed  # the measure sees what it should
    assert all(len(sample.logprobs or ()) == 30 for sample in everything)

    def walk(columns: list[str] | None = None) -> None:
        for _ in corpus.samples(columns):
            pass

    assert peak_kib(walk) < allowed
    assert peak_kib(lambda: walk(["completion", "raw"])) < one_answer_kib
    with Journal.open(tmp_path) as journal:
        sealing = peak_kib(lambda: seal(journal, tmp_path, target_bytes=1 << 20, everything=True))
    assert sealing < allowed
    assert Corpus.open(tmp_path).manifest[0].rows == ROWS
    assert peak_kib(walk) < allowed
    assert list(corpus.samples()) == everything


def test_the_terms_check_parses_no_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BYTES", 64 * KIB)
    make(tmp_path)
    corpus = Corpus.open(tmp_path)
    expected = corpus.distinct([*lineage.FACT_COLUMNS, "completion"])
    assert {fact.pop("completion") for fact in expected} == {str(number + 1) for number in range(ROWS)}
    monkeypatch.setattr(completion, "parse", lambda *_, **__: pytest.fail("an answer was parsed"))
    facts: list[dict[str, Any]] = []
    peak = peak_kib(lambda: facts.extend(corpus.distinct(lineage.FACT_COLUMNS)))
    assert peak * KIB < ROWS / 2 * len(heavy_raw(1))
    assert facts == [expected[0]]
    assert (facts[0]["response_model"], facts[0]["provider"]) == ("mock-2026", "")


def test_a_file_is_read_in_portions_whatever_its_row_groups_are(tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BYTES", 64 * KIB)
    rows = [{"key": f"{n}", "raw": bytes(40 * KIB if n == 7 else 10)} for n in range(1300)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1000)
    with pq.ParquetFile(tmp_path / "a.parquet") as file:
        batches = list(batching.batch_file(file, ["key", "raw"]))
        assert sum(batch.num_rows for batch in batching.batch_file(file, ["key"])) == 1300
    assert [key for batch in batches for key in batch.column("key").to_pylist()] == [r["key"] for r in rows]
    assert max(batch.nbytes for batch in batches) <= 64 * KIB
    assert max(batch.num_rows for batch in batches) <= batching.MAX_ROWS


# --- who signed -------------------------------------------------------------------------------------

NAMES = st.sampled_from(["model", "provider", "choices", 'a"model', "x", "mode\\l"])
VALUES = st.recursive(
    st.none() | st.integers() | st.text('model":\\{}, é', max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
CHOICES = [{"index": 0, "message": {"content": '{"model": "no"}'}, "finish_reason": "stop", "logprobs": None}]


def agrees(raw: bytes) -> None:
    try:
        parsed = completion.parse(raw)
    except TeacherError:
        return  # no answer, and never stored as one
    assert model_and_provider(raw) == (parsed.model, parsed.provider)


@given(
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.dictionaries(NAMES, VALUES, max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_model_and_provider_are_those_of_the_parsed_body(
    before: dict, after: dict, is_ascii: bool, indent: int | None
):
    document = {**before, "choices": CHOICES, **{k: v for k, v in after.items() if k != "choices"}}
    text = json.dumps(document, ensure_ascii=is_ascii, indent=indent)
    agrees(text.encode())
    agrees(text.replace("model", "\\u006dodel").encode())
    events = [{**before, "choices": [{"index": 0, "delta": {"content": "4"}}]}, {**after, "usage": {}}]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    agrees(b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "a", "choices": %s, "model": "b"}',
        '{"model": "a", "model": 3, "choices": %s}',
        '{"choices": %s, "usage": {"model": "inner"}, "provider": "P"}',
        '\ufeff{"provider" : "P\\"q", "choices": %s, "x": NaN, "model": "m"}',
        '{"x": "\\ud800", "model": "m", "choices": %s}',
    ],
)
def test_model_and_provider_of_odd_bodies_are_those_of_the_parsed_body(text: str):
    agrees((text % json.dumps(CHOICES)).encode("utf-8", "surrogatepass"))

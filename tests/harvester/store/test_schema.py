"""Test the Parquet schema: a Sample survives writing and reading, and the columns are pinned."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.store.shards.schema import COLUMNS, SCHEMA, Sample, from_row, to_row, to_table

VERSION_1 = """
key prompt_id sample_index messages completion reasoning refusal tool_calls_json outcome finish_reason
logprobs reference tags metadata_json source_file source_line request_json raw teacher_id endpoint
request_model response_model system_fingerprint response_id provider terms_id permission_sha256 purpose mock
input_tokens output_tokens cached_tokens reasoning_tokens usage_source cost_microusd attempts latency_s
created_at run_id config_sha256 tool_version former_key
"""

text = st.text(max_size=20)
logprob = st.floats(-30, 0, width=16)
alternative = st.fixed_dictionaries(
    {"token": text, "bytes": st.none() | st.binary(max_size=4), "logprob": logprob}
)
token = st.tuples(alternative, st.lists(alternative, max_size=2)).map(
    lambda drawn: {**drawn[0], "top": drawn[1]}
)
samples = st.builds(
    Sample,
    key=st.binary(min_size=32, max_size=32).map(bytes.hex),
    prompt_id=text,
    messages=st.lists(st.fixed_dictionaries({"role": text, "content": st.none() | text}), max_size=3),
    completion=st.none() | text,
    outcome=text,
    finish_reason=text,
    sample_index=st.integers(0, 2**31 - 1),
    reasoning=st.none() | text,
    logprobs=st.none()
    | st.lists(
        alternative.flatmap(
            lambda drawn: st.lists(alternative, max_size=2).map(lambda top: {**drawn, "top": top})
        ),
        max_size=2,
    ),
    reference=st.none() | text,
    tags=st.lists(text, max_size=3),
    raw=st.binary(max_size=50),
    mock=st.booleans(),
    cost_microusd=st.integers(0, 2**62),
    latency_s=st.floats(0, 1e6),
    created_at=st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.just(UTC)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(samples, min_size=1, max_size=4))
def test_samples_survive_parquet(rows):
    sink = io.BytesIO()
    pq.write_table(to_table(rows), sink)
    sink.seek(0)
    table = pq.read_table(sink)
    assert table.schema.equals(SCHEMA)
    assert [from_row(row) for row in table.to_pylist()] == rows


def test_the_columns_of_version_1_are_there_in_order():
    assert [name for name, *_ in COLUMNS] == VERSION_1.split()
    kinds = {name: str(kind) for name, kind, *_ in COLUMNS}
    assert {kinds[name] for name in ("key", "completion", "metadata_json", "run_id")} == {"string"}
    assert kinds["messages"] == "list<item: struct<role: string not null, content: string>>"
    assert (kinds["raw"], kinds["cost_microusd"]) == ("binary", "int64")
    assert kinds["created_at"] == "timestamp[us, tz=UTC]"
    assert SCHEMA.metadata == {b"distil.schema_version": b"1"}
    assert all(field.metadata[b"meaning"] for field in SCHEMA)


def test_a_projected_row_keeps_defaults_for_the_rest():
    sample = from_row({"completion": "4", "outcome": "ok"})
    assert (sample.completion, sample.outcome, sample.key, sample.attempts) == ("4", "ok", "", 1)


def test_content_that_is_no_text_is_kept_as_json():
    parts = [{"type": "text", "text": "\u00e4"}]
    sample = Sample(
        key="k",
        prompt_id="p",
        messages=[{"role": "user", "content": parts}, {"role": "assistant"}],
        completion=None,
        outcome="empty",
        finish_reason="stop",
    )
    assert to_row(sample)["messages"] == [
        {"role": "user", "content": '[{"type":"text","text":"\u00e4"}]'},
        {"role": "assistant", "content": None},
    ]

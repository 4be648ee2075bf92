"""Check through a whole run that every part of an answer arrives in its own column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.api.replies import completion
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.run.prepare import prepare
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from tests.faults.bench import POISON, inline, run_harvest

SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
BY_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}}
ONE = (f"What is {POISON}?",)


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings()) as running:
        yield running


def rows(root: Path) -> list[Sample]:
    return sorted(Corpus.open(root / "store").samples(), key=lambda row: (row.source_line, row.sample_index))


def test_a_cut_stream_is_asked_again_and_never_taken_for_whole(mock: RunningMock, tmp_path: Path) -> None:
    fault = {"action": "stream_cut", "events": 2, "times": 1}
    ended = run_harvest(mock, tmp_path, [fault], sampling={"stream": True})
    assert ended.fired == 1
    assert (ended.exit_code, ended.totals.answers, ended.totals.possibly_billed) == (0, 3, 1)
    assert all(row.outcome == "ok" and row.raw.rstrip().endswith(b"[DONE]") for row in rows(tmp_path))


def test_a_stream_with_a_junk_event_is_kept_and_flagged(mock: RunningMock, tmp_path: Path) -> None:
    fault = {"action": "stream_junk", "events": 2, "times": 1}
    ended = run_harvest(mock, tmp_path, [fault], sampling={"stream": True})
    assert ended.fired == 1
    assert (ended.exit_code, ended.billed["requests"], ended.totals.possibly_billed) == (0, 3, 0)
    assert ended.outcomes == {"ok": 2, "unknown": 1}


def test_json_by_schema_is_checked_and_stored_either_way(mock: RunningMock, tmp_path: Path) -> None:
    faults = [
        {"action": "content", "value": '{"sum": 78}', "prompt": POISON},
        {"action": "content", "value": '{"sum": "many"}'},
    ]
    ended = run_harvest(mock, tmp_path, faults, sampling=BY_SCHEMA)
    assert (ended.exit_code, ended.outcomes, ended.billed["requests"]) == (0, {"ok": 1, "invalid": 2}, 3)
    assert [row.outcome for row in rows(tmp_path)] == ["invalid", "ok", "invalid"]
    assert rows(tmp_path)[0].completion == '{"sum": "many"}'
    again = run_harvest(mock, tmp_path, sampling=BY_SCHEMA)
    assert again.billed["requests"] == 0


def test_a_broken_schema_costs_nothing(mock: RunningMock, tmp_path: Path) -> None:
    broken = {"type": "json_schema", "json_schema": {"schema": {"type": "whole"}}}
    ended = run_harvest(mock, tmp_path, sampling={"max_tokens": 9}, prompts=ONE)
    path = tmp_path / "harvest.toml"
    text = path.read_text().replace("max_tokens = 9", f"response_format = {inline(broken)}")
    path.write_text(text)
    with pytest.raises(ConfigError, match="at type"):
        prepare(path)
    assert ended.exit_code == 0


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_has_its_own_column(mock: RunningMock, tmp_path: Path, field: str) -> None:
    run_harvest(mock, tmp_path, [{"action": "message", "value": {field: "carry the one"}}], prompts=ONE)
    (row,) = rows(tmp_path)
    assert (row.reasoning, row.outcome) == ("carry the one", "ok")
    assert "carry" not in (row.completion or "")


def test_samples_are_rows_of_their_own_and_n_is_refused(mock: RunningMock, tmp_path: Path) -> None:
    ended = run_harvest(mock, tmp_path, sampling={"samples": 3, "temperature": 1.0})
    assert ended.billed["requests"] == 9
    result = rows(tmp_path)
    assert [row.sample_index for row in result] == [0, 1, 2] * 3
    assert len({row.key for row in result}) == 9
    more = run_harvest(mock, tmp_path, sampling={"samples": 4, "temperature": 1.0})
    assert more.billed["requests"] == 3
    refused = run_harvest(mock, tmp_path, sampling={"extra": {"n": 2}})
    assert (refused.exit_code, refused.billed["requests"]) == (2, 0)
    assert "set samples" in refused.output


def test_row_25_of_several_choices_ours_is_the_one_with_index_0(mock: RunningMock, tmp_path: Path) -> None:
    def choice(index: int, text: str) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}

    swapped = {"choices": [choice(1, "theirs"), choice(0, "ours")]}
    ended = run_harvest(mock, tmp_path, [{"action": "patch", "value": swapped}], prompts=ONE)
    assert ended.fired == 1
    (row,) = rows(tmp_path)
    assert (row.completion, b"theirs" in row.raw) == ("ours", True)


def test_log_probabilities_lie_compact_in_the_shard(mock: RunningMock, tmp_path: Path) -> None:
    run_harvest(mock, tmp_path, sampling={"top_logprobs": 3}, prompts=ONE)
    (shard,) = (tmp_path / "store" / "shards").glob("*.parquet")
    table = pq.read_table(shard, columns=["logprobs", "raw"])
    token = table.schema.field("logprobs").type.value_type
    assert (token.field("bytes").type, token.field("logprob").type) == (pa.binary(), pa.float16())
    sent = orjson.loads(table["raw"][0].as_py())["choices"][0]["logprobs"]["content"]
    kept = table["logprobs"][0].as_py()
    assert [entry["token"] for entry in kept] == [entry["token"] for entry in sent]
    for mine, theirs in zip(kept, sent, strict=True):
        assert mine["bytes"] == bytes(theirs["bytes"])
        assert mine["logprob"] == pytest.approx(theirs["logprob"], rel=1e-3)
        assert len(mine["top"]) == 3


IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 20_000


def test_system_turns_tools_and_images_go_out_as_they_are(mock: RunningMock, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    parts = [
        {"type": "text", "text": f"What is {POISON}?"},
        {"type": "image_url", "image_url": {"url": IMAGE}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png", "detail": "low"}},
    ]
    messages = [
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": parts},
    ]
    faults = [{"action": "tool_call", "function": "add", "arguments": '{"a": 77, "b": 1}'}]
    ended = run_harvest(
        mock,
        tmp_path,
        faults,
        prompts=[{"messages": messages}],
        prompt_table={"system": "Be brief."},
        sampling={"tools": [tool]},
        teacher={"limits": {"tokens_per_minute": 6_000_000}},
        budget={"tokens": 110_000},
    )
    assert (ended.exit_code, ended.outcomes) == (0, {"tool_call": 1}), ended.output
    (row,) = rows(tmp_path)
    assert json.loads(row.tool_calls_json or "")[0]["function"]["name"] == "add"
    sent = json.loads(row.request_json)
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, *messages]
    assert sent["tools"] == [tool]


def test_a_fault_in_our_parser_loses_no_paid_answer(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(completion, "read_usage", broken)
    ended = run_harvest(mock, tmp_path)
    assert (ended.exit_code, ended.outcomes, ended.billed["requests"]) == (0, {"unknown": 3}, 3)
    monkeypatch.undo()
    assert b'"choices"' in rows(tmp_path)[0].raw

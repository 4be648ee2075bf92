"""Read prompt files as other tools write them, and warn about what would be paid for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.api.request_builder import requests
from harvester.config.config import HarvestConfig
from harvester.errors import PromptError
from harvester.mock_teacher.running import RunningMock
from harvester.prompts import formats, reader
from harvester.prompts.row_rules import RowRules
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder

MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        ("name", pa.string()),
        ("tool_calls", pa.list_(pa.struct([("id", pa.string()), ("index", pa.int64())]))),
    ]
)
QUESTION = {"role": "user", "content": "What is 1 + 2?"}


def config(**prompts: object) -> HarvestConfig:
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    return HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": ["a.*"], **prompts}})


@pytest.mark.parametrize(
    "message",
    [
        QUESTION,
        {"role": "user", "content": "Hi.", "name": "ann"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
    ],
)
def test_fields_that_a_parquet_row_lacks_are_not_sent(tmp_path: Path, message: dict[str, object]) -> None:
    messages = [message, QUESTION]
    pq.write_table(pa.table({"messages": pa.array([messages], pa.list_(MESSAGE))}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    parquet, lines = (list(reader.read([name], tmp_path)) for name in ("a.parquet", "b.jsonl"))
    assert parquet[0].messages == tuple(messages)
    # The same conversation has the same key in both formats, so it is paid once.
    first, second = (next(iter(requests(prompts, config()))) for prompts in (parquet, lines))
    assert first.key == second.key


def test_a_table_cell_may_be_as_long_as_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 40_000  # 200 kB; the csv module alone stops at 128 KiB
    (tmp_path / "a.csv").write_text(f'prompt\n"{text}"\n')
    (prompt,) = reader.read(["a.csv"], tmp_path)
    assert prompt.messages[0]["content"] == text
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1000)
    with pytest.raises(PromptError, match=r"a\.csv:2"):
        list(reader.read(["a.csv"], tmp_path))


def test_a_last_assistant_turn_is_sent_or_becomes_the_reference(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "3"}
    rows = [{"messages": [QUESTION, answer]}, {"messages": [QUESTION, answer], "reference": "three"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sent = list(reader.read(["a.jsonl"], tmp_path))
    assert [(len(p.messages), p.reference) for p in sent] == [(2, None), (2, "three")]
    taken = list(reader.read(["a.jsonl"], tmp_path, rules=RowRules(last_assistant="reference")))
    assert [(p.messages, p.reference) for p in taken] == [((QUESTION,), "3"), ((QUESTION,), "three")]
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [answer]}) + "\n")
    with pytest.raises(PromptError, match=r"b\.jsonl:1"):
        list(reader.read(["b.jsonl"], tmp_path, rules=RowRules(last_assistant="reference")))


def test_plan_and_run_warn_of_assistant_turns_and_the_option_keeps_them_home(
    tmp_path: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    mock = mock_teacher(accuracy=1.0)
    path = write_folder(tmp_path, mock.base_url, 0)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} + 30?"},
                {"role": "assistant", "content": "x"},
            ]
        }
        for n in (10, 11)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = harvester("plan", path, "--json")
    assert any(
        "2 of 2 prompts end with an assistant turn" in note for note in json.loads(plan.stdout)["warnings"]
    )
    path.write_text(path.read_text().replace("[prompts]\n", '[prompts]\nlast_assistant = "reference"\n'))
    assert json.loads(harvester("plan", path, "--json").stdout)["warnings"] == []
    assert harvester("run", path).returncode == 0
    samples = list(Corpus.open(tmp_path / "store").samples())
    assert [(len(s.messages), s.completion, s.reference) for s in samples] == [(1, "40", "x"), (1, "41", "x")]


def test_plan_warns_of_many_equal_answers_and_refuses_a_clash_of_ids_as_run_does(
    tmp_path: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    path = write_folder(tmp_path, mock_teacher().base_url, 3)
    path.write_text(path.read_text().replace("temperature = 0.0", "temperature = 0.0\nsamples = 4"))
    planned = json.loads(harvester("plan", path, "--json").stdout)
    assert (planned["rows"], planned["duplicates"]) == (12, 0)
    assert any("samples = 4 at temperature 0" in note for note in planned["warnings"])
    rows = [{"id": 1, "prompt": "What is 10 + 30?"}, {"id": "1", "prompt": "What is 11 + 30?"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for verb in ("plan", "run"):
        done = harvester(verb, path)
        assert (done.returncode, "a.jsonl:1" in done.stderr) == (2, True)


def test_plan_counts_equal_requests_once(tmp_path: Path, mock_teacher: Callable[..., RunningMock]) -> None:
    path = write_folder(tmp_path, mock_teacher().base_url, 0)
    once = json.dumps({"prompt": "What is 10 + 30?"}) + "\n"
    (tmp_path / "a.jsonl").write_text(once)
    single = json.loads(harvester("plan", path, "--json").stdout)
    (tmp_path / "a.jsonl").write_text(once * 5)
    five = json.loads(harvester("plan", path, "--json").stdout)
    assert (five["rows"], five["duplicates"], five["input_tokens"]) == (5, 4, single["input_tokens"])

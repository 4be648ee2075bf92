"""Import prompt files of other tools, through the command line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.errors import PromptError
from harvester.mock_teacher.running import RunningMock
from harvester.prompts import formats, import_file, reader
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder

ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": ADD}
HI = {"role": "user", "content": "Hi?"}
SYSTEM = {"role": "system", "content": "Be brief."}

# A row, the prompt line that it becomes, and the answer that it holds.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "sharegpt": (
        {
            "id": "a",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi?"},
                {"from": "gpt", "value": "Yes."},
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "No."},
            ],
        },
        {
            "id": "a",
            "messages": [
                SYSTEM,
                HI,
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "And?"},
            ],
        },
        "No.",
    ),
    "sharegpt with tools": (
        {
            "tools": json.dumps([ADD]),
            "conversations": [
                {"from": "human", "value": "Hi?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "It is 3."},
            ],
        },
        {
            "messages": [
                HI,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1_0",
                            "type": "function",
                            "function": {"name": "add", "arguments": '{"a": 1}'},
                        }
                    ],
                },
                {"role": "tool", "content": "3", "tool_call_id": "call_1_0"},
            ],
            "tools": [TOOL],
        },
        "It is 3.",
    ),
    "hugging face conversations": (
        {"conversation": [HI, {"role": "assistant", "content": "Yes."}], "language": "en"},
        {"prompt": "Hi?", "language": "en"},
        "Yes.",
    ),
    "texts by turns": ({"dialog": ["Hi?", "Yes."]}, {"prompt": "Hi?"}, "Yes."),
    "ultrachat": (
        {"prompt": "Hi?", "prompt_id": "u1", "messages": [HI, {"role": "assistant", "content": "Yes."}]},
        {"id": "u1", "prompt": "Hi?"},
        "Yes.",
    ),
    "openai fine-tuning": (
        {
            "messages": [SYSTEM, HI, {"role": "assistant", "content": "Yes."}],
            "tools": [TOOL],
            "parallel_tool_calls": False,
        },
        {"messages": [SYSTEM, HI], "tools": [TOOL], "parallel_tool_calls": False},
        "Yes.",
    ),
    "openai batch": (
        {
            "custom_id": "b1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [HI], "max_tokens": 9, "tools": [TOOL]},
        },
        {"id": "b1", "prompt": "Hi?", "tools": [TOOL]},
        None,
    ),
    "responses batch": (
        {"custom_id": "b2", "body": {"input": "Hi?", "instructions": "Be brief."}},
        {"id": "b2", "messages": [SYSTEM, HI]},
        None,
    ),
    "anthropic batch": (
        {"custom_id": "b3", "params": {"system": "Be brief.", "messages": [HI], "max_tokens": 5}},
        {"id": "b3", "messages": [SYSTEM, HI]},
        None,
    ),
    "vertex batch": (
        {"request": {"contents": [{"role": "user", "parts": [{"text": "Hi"}, {"text": "?"}]}]}},
        {"prompt": "Hi?"},
        None,
    ),
    "alpaca": (
        {"instruction": "Translate.", "input": "Hallo", "output": "Hello"},
        {"prompt": "Translate.\n\nHallo"},
        "Hello",
    ),
    "alpaca with history": (
        {
            "instruction": "And?",
            "input": "",
            "output": "No.",
            "system": "Be brief.",
            "history": [["Hi?", "Yes."]],
        },
        {
            "messages": [
                SYSTEM,
                HI,
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "And?"},
            ]
        },
        "No.",
    ),
    "dolly": (
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
        {"prompt": "Ann came.\n\nWho?", "category": "qa"},
        "Ann",
    ),
    "trl text": ({"prompt": "Hi?", "completion": "Yes."}, {"prompt": "Hi?"}, "Yes."),
    "a text that is a list": ({"prompt": "[1, 2]", "completion": "3"}, {"prompt": "[1, 2]"}, "3"),
    "trl turns": (
        {"prompt": [SYSTEM, HI], "completion": [{"role": "assistant", "content": "Yes."}]},
        {"messages": [SYSTEM, HI]},
        "Yes.",
    ),
    "trl preference": (
        {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Hi?"},
        "Yes.",
    ),
    "preference without prompt": (
        {
            "chosen": [HI, {"role": "assistant", "content": "Yes."}],
            "rejected": [HI, {"role": "assistant", "content": "No."}],
        },
        {"prompt": "Hi?"},
        "Yes.",
    ),
    "gsm8k": ({"question": "1+2?", "answer": "1+2=3\n#### 3"}, {"prompt": "1+2?"}, "1+2=3\n#### 3"),
    "squad": (
        {
            "id": "s",
            "context": "Ann came.",
            "question": "Who?",
            "answers": {"text": ["Ann"], "answer_start": [0]},
        },
        {"id": "s", "prompt": "Ann came.\n\nWho?"},
        "Ann",
    ),
    "arc": (
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        {"prompt": "Which?\n\n1. x\n2. y", "answerKey": "2"},
        None,
    ),
    "openorca": (
        {"system_prompt": "Be brief.", "question": "Hi?", "response": "Yes."},
        {"messages": [SYSTEM, HI]},
        "Yes.",
    ),
    "capital letters": ({"Query": "Hi?", "Response": "Yes."}, {"prompt": "Hi?"}, "Yes."),
    "flan": ({"inputs": "Hi?", "targets": "Yes."}, {"prompt": "Hi?"}, "Yes."),
    "an image": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    ],
                },
                {"role": "assistant", "content": "A cat."},
            ]
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "What?"},
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
                    ],
                }
            ]
        },
        "A cat.",
    ),
}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_another_tool_becomes_a_prompt_line(tmp_path: Path, name: str) -> None:
    row, line, answer = ROWS[name]
    path = write(tmp_path / "a.jsonl", [row])
    imported = import_file.import_file(path, tmp_path / "out.jsonl")
    assert lines_of(tmp_path / "out.jsonl") == [line]
    assert (imported.rows, imported.answers) == (1, int(answer is not None))
    import_file.import_file(path, tmp_path / "with.jsonl", answers="reference")
    (line_with_answer,) = lines_of(tmp_path / "with.jsonl")
    assert line_with_answer.get("reference") == answer
    # What was written is what `harvester run` reads.
    (prompt,) = reader.read(["out.jsonl"], tmp_path)
    assert prompt.fields == {key: line[key] for key in ("tools", "parallel_tool_calls") if key in line}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"turns": ["First?", "Second?"]}, "no column that is recognised"),  # MT-Bench: two questions
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown role 'narrator'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "nothing is left to ask"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "a tool call that is not there"),
        ({"prompt": "Other?", "messages": [HI]}, "they differ"),
        ({"question": "Which?", "choices": [1, 2]}, "not a list of texts"),
        ({"question": "  "}, "not a text"),
        ({"custom_id": "b", "response": {"body": {"choices": []}}}, "no column that is recognised"),
    ],
)
def test_a_row_that_can_not_be_asked_is_skipped_and_named(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "Hi?"}, row])
    imported = import_file.import_file(path, tmp_path / "out.jsonl")
    (message,) = imported.skipped
    assert reason in message
    assert imported.skipped_at[message] == f"{path}:2"
    assert lines_of(tmp_path / "out.jsonl") == [{"prompt": "Hi?"}]


def test_the_command_says_what_it_did_and_overwrites_nothing(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "instruction": "Hi?", "input": "", "output": "Yes.", "level": "easy"},
        {"id": 1, "question": "And?", "answer": "No.", "picture": None},
        ["no object"],
    ]
    path = write(tmp_path / "set.jsonl", rows)
    done = harvester("import", path)
    assert (done.returncode, done.stderr) == (0, "")
    written = tmp_path / "set.prompts.jsonl"
    assert lines_of(written) == [{"id": "1", "prompt": "Hi?", "level": "easy"}, {"prompt": "And?"}]
    for words in (
        "wrote 2 prompt lines",
        "recognised 1: Alpaca",
        "recognised 1: a question column",
        "left out in 2: answers",
        "left out in 1: ids that occur twice",
        "kept as metadata: level",
        "skipped 1: a JSON object is expected",
        f'first ({path}:1): {{"id":"1"',
    ):
        assert words in done.stdout
    before = written.read_bytes()
    again = harvester("import", path, "--answers", "reference")
    assert (again.returncode, written.read_bytes()) == (2, before)
    assert "exists already" in again.stderr
    assert names_in(tmp_path) == ["set.jsonl", "set.prompts.jsonl"]
    stdout = harvester("import", path, "--answers", "reference", "-o", "-")
    assert [json.loads(line).get("reference") for line in stdout.stdout.splitlines()] == ["Yes.", "No."]
    assert "wrote 2 prompt lines to stdout" in stdout.stderr


@pytest.mark.parametrize("endpoint", ["embeddings", "moderations", "images/generations"])
def test_a_batch_line_that_asks_for_no_text_is_no_prompt(tmp_path: Path, endpoint: str) -> None:
    body = {"model": "m", "input": "a text", "prompt": "a text"}
    line = {"custom_id": "1", "method": "POST", "url": f"/v1/{endpoint}", "body": body}
    with pytest.raises(PromptError, match="no column that is recognised"):
        import_file.import_file(write(tmp_path / "b.jsonl", [line]), tmp_path / "out.jsonl")
    assert names_in(tmp_path) == ["b.jsonl"]
    line["url"] = "/v1/completions"
    import_file.import_file(write(tmp_path / "b.jsonl", [line]), tmp_path / "out.jsonl")
    assert len(lines_of(tmp_path / "out.jsonl")) == 1


def test_nothing_recognised_is_an_error_that_shows_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"Frage": "Hi?", "n": 1}])
    with pytest.raises(PromptError, match="Frage, n") as caught:
        import_file.import_file(path, tmp_path / "out.jsonl")
    assert "--column" in caught.value.remedy
    assert names_in(tmp_path) == ["a.jsonl"]
    import_file.import_file(path, tmp_path / "out.jsonl", column="Frage")
    assert lines_of(tmp_path / "out.jsonl") == [{"prompt": "Hi?", "n": 1}]


def table_rows() -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + 30?", "answer": str(n + 30), "note": None} for n in range(10, 13)]


def write_kind(folder: Path, kind: str) -> Path:
    """Write the rows of `table_rows` in one of the containers."""
    rows = table_rows()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = pa.Table.from_pylist(rows)
    path = folder / f"set.{kind}"
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(text))
    elif kind == "jsonl.zst":
        path.write_bytes(pa.compress(text, codec="zstd", asbytes=True))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        path.write_text("question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows))
    elif kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    elif kind == "arrows":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        path = folder / "saved"
        path = path / "train" if kind == "dict" else path
        path.mkdir(parents=True)
        for number in range(2):
            part = table.slice(2 * number, 2)
            with pa.ipc.new_stream(path / f"data-{number:05d}-of-00002.arrow", table.schema) as writer:
                writer.write_table(part)
        names = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
        (path / "state.json").write_text(json.dumps({"_data_files": names, "_split": "train"}))
        (path / "dataset_info.json").write_text("{}")
        if kind == "dict":
            (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
            path = folder / "saved"
    return path


CONTAINERS = ["jsonl.gz", "jsonl.zst", "json", "csv", "parquet", "arrow", "arrows", "folder", "dict"]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_is_read(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path, kind)
    import_file.import_file(path, tmp_path / "out.jsonl", answers="reference")
    assert lines_of(tmp_path / "out.jsonl") == [
        {"prompt": row["question"], "reference": row["answer"]} for row in table_rows()
    ]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_reading_another_format_names_the_import(tmp_path: Path, kind: str) -> None:
    path = write_kind(tmp_path, kind)
    with pytest.raises(PromptError) as caught:
        list(reader.read([path.name], tmp_path))
    assert f"`harvester import {path.name}" in caught.value.remedy or kind == "json"


def test_plan_names_the_import_and_run_reads_compressed_lines_and_a_dataset_folder(
    tmp_path: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    config = write_folder(tmp_path, mock_teacher(accuracy=1.0).base_url, 0)
    folder = write_kind(tmp_path, "folder")
    config.write_text(config.read_text().replace('"*.jsonl"', '"saved", "more.jsonl.zst"'))
    text = json.dumps({"prompt": "What is 11 + 30?"}).encode()
    (tmp_path / "more.jsonl.zst").write_bytes(pa.compress(text, codec="zstd", asbytes=True))
    refused = harvester("plan", config)
    assert refused.returncode == 2
    assert "it looks like a question column" in refused.stderr
    assert "`harvester import saved/data-00000-of-00002.arrow`" in refused.stderr
    table = pa.Table.from_pylist([{"prompt": "What is 10 + 30?", "tags": None}])
    with pa.ipc.new_file(folder / "data-0.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    assert harvester("run", config).returncode == 0
    samples = Corpus.open(tmp_path / "store").samples()
    assert sorted((s.completion, s.metadata_json) for s in samples) == [("40", "{}"), ("41", "{}")]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "arrow", "arrows", "json"])
@pytest.mark.parametrize("damage", ["cut", "junk"])
def test_a_damaged_container_is_one_error(tmp_path: Path, kind: str, damage: str) -> None:
    path = write_kind(tmp_path, kind)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"\xff\x00junk" * 40)
    with pytest.raises(PromptError) as caught:
        import_file.import_file(path, tmp_path / "out.jsonl")
    assert str(path) in caught.value.place
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', "no name of a file"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "lacks its file gone.arrow"),
        ('{"_data_files": []}', "holds no .arrow file"),
        ("[1]", "not a JSON object"),
        ("{", "can't be read"),
    ],
)
def test_a_wrong_dataset_folder_is_named(tmp_path: Path, state: str, words: str) -> None:
    path = write_kind(tmp_path, "folder")
    (path / "state.json").write_text(state)
    with pytest.raises(PromptError, match=words):
        import_file.import_file(path, tmp_path / "out.jsonl")


def test_several_splits_are_named(tmp_path: Path) -> None:
    path = write_kind(tmp_path, "dict")
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(PromptError, match="train, test"):
        import_file.import_file(path, tmp_path / "out.jsonl")
    assert import_file.import_file(path / "train", tmp_path / "out.jsonl").rows == 3


def test_a_long_json_list_is_read_in_portions(tmp_path: Path) -> None:
    """An element may be cut anywhere by the portions, and the list may hold what is no object."""
    rows: list[Any] = [{"question": "ü" * (n * 97), "n": n} for n in range(1, 400)]
    rows[7] = 12345
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + json.dumps(rows, indent=2, ensure_ascii=False))
    read = list(formats.rows(path, "a.json", any_columns=True))
    assert [number for number, _ in read] == list(range(1, 400))
    assert [row for _, row in read if isinstance(row, dict)] == [row for row in rows if row != 12345]
    path.write_text(json.dumps(rows)[:-1])
    with pytest.raises(PromptError, match="is missing"):
        list(formats.rows(path, "a.json", any_columns=True))

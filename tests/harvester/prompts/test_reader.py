"""Test prompt files: every format that is read, every fault with its file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config.config import HarvestConfig
from harvester.errors import PromptError
from harvester.prompts import completed_files, formats, reader


def write(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_line_becomes_a_prompt_and_what_is_not_ours_travels_as_metadata(tmp_path: Path):
    write(
        tmp_path,
        "a.jsonl",
        {"prompt": "2+2?", "id": "x", "reference": "4", "tags": ["sum"], "split": "train"},
    )
    (prompt,) = reader.read(["a.jsonl"], tmp_path)
    assert prompt.messages == ({"role": "user", "content": "2+2?"},)
    assert (prompt.id, prompt.reference, prompt.tags, prompt.metadata) == (
        "x",
        "4",
        ("sum",),
        {"split": "train"},
    )
    assert (prompt.file, prompt.line) == ("a.jsonl", 1)


def test_text_csv_parquet_and_gz_say_the_same(tmp_path: Path):
    write(tmp_path, "a.txt", "hello", "", "world")
    write(tmp_path, "b.csv", "prompt,reference", "hello,", '"world",w')
    pq.write_table(pa.table({"prompt": ["hello", "world"], "reference": [None, "w"]}), tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as handle:
        handle.write('{"prompt": "hello"}\n{"prompt": "world"}\n')
    result = [
        (p.file, p.messages[0]["content"])
        for p in reader.read(["*.txt", "*.csv", "*.parquet", "*.gz"], tmp_path)
    ]
    assert result == [
        (name, text) for name in ("a.txt", "b.csv", "c.parquet", "d.jsonl.gz") for text in ("hello", "world")
    ]


def test_byte_order_mark_carriage_returns_and_blank_lines_are_harmless(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "y"}\r\n')
    prompts = list(reader.read(["a.jsonl"], tmp_path))
    assert [(p.messages[0]["content"], p.line) for p in prompts] == [("x", 1), ("y", 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a JSON line"),
        ("[1]", "a JSON object is expected"),
        ("{}", "needs 'prompt'"),
        ('{"prompt": "  "}', "needs 'prompt'"),
        ('{"prompt": 3}', "needs 'prompt'"),
        ('{"prompt": "a", "messages": []}', "keep one"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "needs a role"),
        ('{"messages": [{"role": "user"}]}', "needs 'content'"),
        ('{"prompt": "a", "tags": "b"}', "tags must be a list"),
        ('{"prompt": "\\ud800"}', "not a JSON line"),
        ('{"prompt": NaN}', "not a JSON line"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(tmp_path: Path, line: str, message: str):
    write(tmp_path, "a.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(PromptError) as caught:
        list(reader.read(["a.jsonl"], tmp_path))
    assert message in str(caught.value)
    assert caught.value.place == "a.jsonl:2"
    assert caught.value.exit_code == 2


def test_broken_files_are_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is no parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 50)[:-20])
    (tmp_path / "c.csv").write_text("question\nx\n")
    (tmp_path / "d.yaml").write_text("x")
    (tmp_path / "e.txt").write_bytes(b"ok\n\xff\xfe\n")
    (tmp_path / "f.jsonl").write_text("\n\n")
    for name in ("a.parquet", "b.jsonl.gz", "c.csv", "d.yaml", "e.txt", "f.jsonl", "missing.jsonl"):
        with pytest.raises(PromptError) as caught:
            list(reader.read([name], tmp_path))
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv.gz", b"prompt,level\nhello,1\nworld,2\n"), ("a.txt.gz", b"hello\nworld\n")],
)
def test_every_text_may_be_compressed_and_a_flipped_byte_is_named(tmp_path: Path, name: str, data: bytes):
    path = tmp_path / name
    path.write_bytes(gzip.compress(data))
    assert [p.messages[0]["content"] for p in reader.read([name], tmp_path)] == ["hello", "world"]
    complete = bytearray(gzip.compress(b"prompt\n" + b"".join(b"%d\n" % n**9 for n in range(300))))
    for place in range(20, len(complete) - 8, 97):
        flipped = complete.copy()
        flipped[place] ^= 0x55
        path.write_bytes(flipped)
        with pytest.raises(PromptError, match=name):
            list(reader.read([name], tmp_path))


def test_rows_of_parquet_that_have_no_value_are_bad_lines(tmp_path: Path):
    texts = pa.array([b"one", b"\xff\xfe", b"three"], pa.binary())
    whens = pa.array([0, 1, 2**62], pa.timestamp("us"))
    odd = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"prompt": odd, "when": whens}), tmp_path / "a.parquet")
    bad: list[PromptError] = []
    prompts = list(reader.read(["a.parquet"], tmp_path, bad.append))
    assert [(p.messages[0]["content"], p.line) for p in prompts] == [("one", 1)]
    assert [entry.place for entry in bad] == ["a.parquet:2", "a.parquet:3"]
    part = {"role": "user", "content": [{"type": "text", "data": b"x"}]}
    pq.write_table(pa.table({"messages": [[part]], "reference": [b"r"]}), tmp_path / "b.parquet")
    with pytest.raises(PromptError, match=r"b\.parquet:1: no canonical JSON"):
        list(reader.read(["b.parquet"], tmp_path))
    pq.write_table(pa.table({"prompt": ["x"], "reference": [b"r"]}), tmp_path / "b.parquet")
    (row,) = reader.read(["b.parquet"], tmp_path)
    assert "r" in str(row.reference)


def test_a_name_that_is_no_utf_8_is_shown_in_ascii(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    path.write_text('{"prompt": "x"}\n{')
    with pytest.raises(PromptError) as caught:
        list(reader.read(["*.jsonl"], tmp_path))
    assert caught.value.place == "\\xff.jsonl:2"
    path.write_text('{"prompt": "x"}\n')
    (prompt,) = reader.read(["*.jsonl"], tmp_path)
    assert prompt.file == "\\xff.jsonl"
    teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
    config = HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": ["*.jsonl"]}})
    assert completed_files.digest_of(config, tmp_path) is not None


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "name or glob"),
        ("**x", "stands alone"),
        ("x" * 300, "x" * 300),
        ("a\0b", "no "),
        ("/nowhere/*.jsonl", "relative to the configuration file"),
        ("nowhere.jsonl", "beside the config"),
    ],
)
def test_a_name_that_matches_nothing_says_why(tmp_path: Path, pattern: str, says: str):
    with pytest.raises(PromptError) as caught:
        reader.find([pattern], tmp_path)
    assert says in str(caught.value)


def test_a_line_longer_than_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 64)
    write(tmp_path, "a.jsonl", {"prompt": "x" * 80})
    with pytest.raises(PromptError, match="longer than"):
        list(reader.read(["a.jsonl"], tmp_path))


@given(text=st.text(min_size=1).filter(lambda text: not reader.is_blank(text)))
def test_the_derived_id_depends_on_the_text_alone(text: str):
    first = reader.to_prompt({"prompt": text}, file="a", line=1)
    same = reader.to_prompt({"prompt": text, "reference": "r"}, file="b", line=9)
    other = reader.to_prompt({"prompt": text + "."}, file="a", line=1)
    assert first.id == same.id != other.id


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("a.csv", "prompt,id,prompt\nx,1,y", "two columns 'prompt'"),
        ("a.csv", "prompt,tag,tag\nx,1,2", "two columns 'tag'"),
        ("a.jsonl", '{"prompt": "x", "prompt": "y"}', "'prompt' twice"),
        ("a.jsonl", '{"messages": [], "messages": [{"role": "user", "content": "x"}]}', "'messages' twice"),
        ("a.jsonl", '{"prompt": "x", "m": {"prompt": ' + "[" * 1000 + "]" * 1000 + "}}", "nested too deep"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": ""}]}', "no message has any text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": []}]}', "no message has any text"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": " "}]}]}',
            "no message has any text",
        ),
        ("a.jsonl", '{"prompt": "\\u200b\\ufeff "}', "needs 'prompt'"),
        ("a.json", '[{"prompt": "x"}]', "`harvester import a.json` writes it"),
    ],
)
def test_what_would_be_lost_or_asked_for_nothing_is_refused(tmp_path: Path, name: str, line: str, words: str):
    write(tmp_path, name, line)
    with pytest.raises(PromptError) as caught:
        list(reader.read([name], tmp_path))
    assert words in str(caught.value)


def test_columns_of_one_name_in_arrow_and_parquet_are_refused(tmp_path: Path):
    batch = pa.RecordBatch.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as file:
        file.write_batch(batch)
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "a.parquet")
    for name in ("a.arrow", "a.parquet"):
        with pytest.raises(PromptError, match="two columns 'prompt'"):
            list(reader.read([name], tmp_path))


def test_a_prompt_may_speak_of_prompts_and_begin_with_a_mark(tmp_path: Path):
    lines = [
        {"prompt": 'Write {"prompt": "x", "prompt": "y"}', "n": {"prompt": 1}},
        {"prompt": "\ufeff2+2?"},
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "image_url"}]},
            ]
        },
    ]
    write(tmp_path, "a.jsonl", *lines)
    assert len(list(reader.read(["a.jsonl"], tmp_path))) == 3

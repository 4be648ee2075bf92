"""Test wrong files and values: a command says what, where and what to do, and never waits."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from harvester.errors import PromptError, StoreCorrupt, StoreError
from harvester.prompts import formats, reader
from harvester.store.journal.journal import Journal
from harvester.store.shards import parquet_file, proved
from harvester.store.shards.seal import seal
from harvester.system import decode_first
from tests import commands
from tests.faults.bench import run
from tests.harvester.store_rows import fill, open_store
from tests.hostile.runs import harvest
from tests.hostile.server import hostile_teacher

CONFIG = """\
[teacher]
base_url = "http://127.0.0.1:9/v1"
model = "mock-teacher"
terms = "mock-teacher"
[prompts]
files = ["{files}"]
[store]
path = "{store}"
"""


def refused(*arguments: object, exit_code: int = 2) -> str:
    """What a command says on stderr that must be refused."""
    result = commands.run("harvester", list(arguments), timeout=240)
    assert (result.returncode, "Traceback" in result.stderr) == (exit_code, False), result.stderr
    return str(result.stderr)


def configured(root: Path, files: str = "p.jsonl", store: str = "store") -> Path:
    (root / "harvest.toml").write_text(CONFIG.format(files=files, store=store))
    return root / "harvest.toml"


def test_a_status_that_is_no_file_or_no_json_is_named(tmp_path: Path) -> None:
    with open_store(tmp_path / "store") as journal:
        fill(journal, range(3))
    status = tmp_path / "store" / "status.json"
    os.mkfifo(status)
    for fault in ("is not a regular file", "is no JSON", "is no JSON object"):
        result = commands.run("harvester", ["status", tmp_path / "store"], timeout=240)
        assert (result.returncode, fault in result.stdout, "3 answers stored" in result.stdout) == (
            0,
            True,
            True,
        )
        status.unlink()
        status.write_text("{" if fault == "is not a regular file" else "[]")


def test_a_fault_script_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "faults.toml")
    assert "regular file" in refused("mock-teacher", "--port", "0", "--faults", tmp_path / "faults.toml")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_store_that_is_a_file_and_prompts_that_are_a_folder_are_named(command: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "a-file").touch()
    assert "is a file" in refused(command, configured(tmp_path, store="a-file"))
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(command, configured(tmp_path, files="folder"))


def test_what_can_not_be_imported_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "utf16.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-16")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    out = ("--out", tmp_path / "out.jsonl")
    assert "pipe" in refused("import", tmp_path / "fifo.jsonl", *out)
    assert "holds no row" in refused("import", tmp_path / "empty.jsonl", *out)
    assert "iconv -f UTF-16" in refused("import", tmp_path / "utf16.jsonl", *out)
    said = refused("import", tmp_path / "p.jsonl", *out, "--column", "zzz")
    assert "no column 'zzz'; its columns are prompt" in said


def test_values_out_of_range_are_refused_in_words(tmp_path: Path) -> None:
    Journal.open(tmp_path / "store").close()
    assert "more than 0" in refused("set", tmp_path / "store", "rpm", "-5")
    assert "is empty" in refused("init", "")


def test_a_row_of_csv_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('prompt,x\n\n"a\nb",1\n"c\nd",2,3\n,5\ne,6\n')
    rows = list(formats.rows(path, "p.csv"))
    numbers = [number for number, _ in rows]
    assert numbers == [3, 5, 7, 8] or numbers == [4, 5, 7, 8]
    (error,) = [row for _, row in rows if isinstance(row, PromptError)]
    assert error.place == "p.csv:5"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "json"])
def test_blank_lines_without_end_are_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvester.prompts import json_lists

    monkeypatch.setattr(formats, "MOST_BLANK_BYTES", 1 << 16)
    monkeypatch.setattr(json_lists, "_MOST_BLANK", 1 << 16)
    path = tmp_path / f"p.{suffix}.gz"
    head = b"[" if suffix == "json" else b"prompt\n" if suffix == "csv" else b""
    path.write_bytes(gzip.compress(head + b"\n" * (1 << 18)))
    with pytest.raises(PromptError, match="blank"):
        list(formats.rows(path, "p", any_columns=suffix == "json"))


def test_ids_beyond_64_bits_keep_their_digits(tmp_path: Path) -> None:
    ids = [10**30 + 1, 10**30 + 2, -(10**25)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "id": number, "n": number}) + "\n" for number in ids))
    assert [prompt.id for prompt in reader.read(["p.jsonl"], tmp_path)] == [str(number) for number in ids]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_an_arrow_file_is_decoded_in_a_child_first(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"prompt": ["a", "b"] * 50})
    path = tmp_path / "p.arrow"
    opened = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table)
    whole = path.read_bytes()
    assert len(list(formats.rows(path, "p"))) == 100
    asked: list[str] = []

    def ends(function: str, *_: object, **__: object) -> None:
        asked.append(function)
        raise MemoryError("the child process ended")

    monkeypatch.setattr(decode_first, "_decodable", set())
    monkeypatch.setattr(decode_first.for_files, "call", ends)
    with pytest.raises(PromptError, match="is damaged"):
        list(formats.rows(path, "p"))
    assert asked == ["harvester.prompts.formats:decode_arrow"]
    monkeypatch.undo()
    for place in range(8, len(whole), len(whole) // 15):
        damaged = bytearray(whole)
        damaged[place] ^= 0x7F
        path.write_bytes(damaged)
        try:
            rows = list(formats.rows(path, "p"))
        except PromptError:
            continue
        assert len(rows) <= 100


def test_a_changed_key_ends_a_run_before_anything_is_asked(tmp_path: Path) -> None:
    import sqlite3

    with hostile_teacher() as teacher:
        assert harvest(tmp_path, teacher.base_url, ["a", "b", "c"]).exit_code == 0
        asked = list(teacher.asked)
        with sqlite3.connect(tmp_path / "store" / "journal.db") as connection:
            assert connection.execute("SELECT count(*) FROM keys").fetchone() == (3,)
            connection.execute("UPDATE keys SET asker = x'00' WHERE key = (SELECT min(key) FROM keys)")
        connection.close()
        with (tmp_path / "p.jsonl").open("a") as file:
            file.write('{"prompt": "new"}\n')
        exit_code, said = run(tmp_path / "harvest.toml")
        assert (exit_code, "keys" in said, "--repair" in said) == (5, True, True)
        assert teacher.asked == asked


def test_memory_that_runs_out_while_sealing_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    with open_store(store) as journal:
        fill(journal, range(20))
    fired: list[int] = []

    def runs_out(*_: object, **__: object) -> None:
        fired.append(1)
        raise pa.ArrowMemoryError("malloc of size 4194304 failed")

    with monkeypatch.context() as patch, Journal.open(store) as journal:
        patch.setattr(parquet_file.pq.ParquetWriter, "write_table", runs_out)
        with pytest.raises(StoreError, match="memory ran out") as error:
            seal(journal, store, target_bytes=1 << 20, everything=True)
    assert fired
    assert "nothing is lost" in error.value.remedy
    with Journal.open(store) as journal:
        assert seal(journal, store, target_bytes=1 << 20, everything=True).rows == 20


def test_a_shortage_of_files_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    program = f"ulimit -n 12; exec {sys.executable} -m harvester run {configured(tmp_path)}"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in result.stderr
    assert "error[" in result.stderr
    assert "limit of open files" in result.stderr or "file descriptor" in result.stderr


@pytest.mark.parametrize("limit", [1 << 32, -1])
def test_what_a_child_dies_of_is_said(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object, **__: object) -> None:
        raise MemoryError("the child process ended")

    monkeypatch.setattr(decode_first.for_files, "call", dies)
    monkeypatch.setattr(decode_first.resource, "getrlimit", lambda _: (limit, limit))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(StoreCorrupt, match="ulimit -v" if limit > 0 else "ends the process"):
        proved.require_proved(tmp_path / "x.parquet", "", 0)


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ("", "must name a folder"),
        ("~/answers", "~ is not replaced"),
        ("loop/store", "symbolic link"),
        ("x" * 300, "file name too long"),
    ],
)
def test_a_store_that_no_path_leads_to_is_refused(store: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "loop").symlink_to("loop")
    config = configured(tmp_path, store=store)
    assert words in refused("run", config, exit_code=2 if "must" in words or "~" in words else 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harvest.toml", "loop", "p.jsonl"]


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    config = configured(tmp_path, files="none.jsonl")
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert "none.jsonl" in refused("plan", config)


def test_plan_refuses_a_schema_that_run_refuses(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    config = configured(tmp_path)
    form = '{type = "json_schema", json_schema = {name = "s", schema = {"$ref" = "#/$defs/A"}}}'
    config.write_text(f"{config.read_text()}[sampling]\nresponse_format = {form}\n")
    for command in ("plan", "run"):
        assert "'#/$defs/A' leads nowhere" in refused(command, config)

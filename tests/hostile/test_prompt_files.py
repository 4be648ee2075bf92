"""Prompt files that ended in a traceback, or took gigabytes."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.errors import PromptError
from harvester.prompts import formats


@pytest.mark.parametrize("rows", [1, 2, 1025])
def test_a_time_out_of_range_is_the_error_of_its_row(rows: int, tmp_path: Path) -> None:
    times = pa.array([0] * (rows - 1) + [1 << 62], pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": ["a"] * rows, "at": times}), tmp_path / "p.parquet")
    *good, (number, row) = formats.rows(tmp_path / "p.parquet", "p.parquet")
    assert number == rows
    assert isinstance(row, PromptError)
    assert not any(isinstance(row, PromptError) for _, row in good)


def test_large_rows_come_in_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_BATCH_BYTES", 1 << 20)
    texts = [os.urandom(1 << 16).hex() for _ in range(40)]
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "p.parquet", row_group_size=40)
    with pq.ParquetFile(tmp_path / "p.parquet") as file:
        batches = list(formats._parquet_batches(file))
    assert max(batch.nbytes for batch in batches) <= 2 * formats.MAX_BATCH_BYTES
    assert sum(batch.num_rows for batch in batches) == 40


def test_one_long_line_of_a_packed_csv_file_is_an_error(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "p.csv.gz", "wb", compresslevel=1) as out:
        out.write(b"prompt\n" + b"a" * (20 << 20))
    with pytest.raises(PromptError):
        list(formats.rows(tmp_path / "p.csv.gz", "p.csv.gz"))


def test_damage_in_a_parquet_file_is_an_error_in_words(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": [f"row {n}" for n in range(200)]}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole), max(1, len(whole) // 25)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            list(formats.rows(path, "p.parquet"))
        except PromptError:
            continue


@pytest.mark.parametrize("content", [b"PAR1", b"", b"PAR1" * 100, b"\x00" * 1000])
def test_what_is_no_parquet_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(content)
    with pytest.raises(PromptError):
        list(formats.rows(tmp_path / "p.parquet", "p.parquet"))

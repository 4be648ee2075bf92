"""Test the records of stages: what counts as done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trainer.distil.records import Records, StageResult
from trainer.model.made_files import made_files

KEY = "a" * 64


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with a page that a stage made, and its record."""
    folder = tmp_path / "out"
    folder.mkdir()
    page = folder / "report.html"
    page.write_text("page")
    files = made_files(folder, [page])
    Records(folder).add(StageResult("report", KEY, {"report": str(page)}, 1.0, is_new=True, files=files))
    return folder


def test_a_stage_is_done_by_its_key_and_its_files(out: Path) -> None:
    assert Records(out).find("report", KEY) is not None
    assert Records(out).find("report", "b" * 64) is None
    for damaged in (b"", b"pagE"):
        (out / "report.html").write_bytes(damaged)
        assert Records(out).find("report", KEY) is None
    (out / "report.html").write_text("page")
    assert Records(out).find("report", KEY) is not None
    (out / "report.html").unlink()
    assert Records(out).find("report", KEY) is None


def test_a_copied_folder_names_its_own_files(out: Path) -> None:
    copy = out.with_name("copy")
    shutil.copytree(out, copy)
    found = Records(copy).find("report", KEY)
    assert found is not None
    assert found.result == {"report": str(copy / "report.html")}
    (copy / "report.html").write_text("x")
    assert Records(copy).find("report", KEY) is None
    assert Records(out).find("report", KEY) is not None


@pytest.mark.parametrize("absent", ["key", "result", "seconds", "files"])
def test_a_record_that_lacks_a_part_counts_as_absent(out: Path, absent: str) -> None:
    for path in out.glob("stages/*.json"):
        held = json.loads(path.read_text())
        del held[absent]
        path.write_text(json.dumps(held))
    assert Records(out).find("report", KEY) is None
    assert Records(out).newest("report") is None

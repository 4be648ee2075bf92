"""Test a result whose reader left, or that a full disk refuses: one line, the exit code of the run."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from harvester.cli import main
from harvester.mock_teacher.running import RunningMock
from tests.journey.run_process import running, write_folder

Mock = Callable[..., RunningMock]
VERBS = (
    ("run", "CONFIG"),
    ("plan", "CONFIG"),
    ("schedule", "--cron", "CONFIG"),
    ("status", "CONFIG", "--check"),
    ("metrics", "CONFIG"),
    ("verify", "CONFIG", "--json"),
    ("explain", "10"),
    ("config", "schema"),
    ("terms", "list"),
    ("--version",),
    ("run", "--help"),
)


def left() -> TextIO:
    """A pipe whose reader is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def full() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")  # noqa: PTH123 - the door closes it


def ended(words: tuple[str, ...], config: Path, stdout: TextIO, monkeypatch: pytest.MonkeyPatch) -> int:
    values = [str(config) if word == "CONFIG" else word for word in words]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["harvester", *values])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(main, "skip_unused_imports", lambda: None)  # other tests of this process use pandas
        with pytest.raises(SystemExit) as caught:
            main.main()
    stdout.close()  # flushes what a full disk left in its buffer: that must not fail either
    return int(caught.value.code or 0)


def test_a_full_disk_under_stdout_is_one_error_and_never_the_end_of_a_run(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 5)
    result = {}
    for words in VERBS:
        more = ("--limit", "2") if words == ("run", "CONFIG") else ()
        result[words] = ended((*words, *more), config, full(), monkeypatch)
        stderr = capsys.readouterr().err
        assert "stdout can't be written: No space left on device" in stderr
        assert (stderr.count("error["), "Traceback" in stderr) == (int(bool(result[words] != 10)), False)
    assert result.pop(("run", "CONFIG")) == 10  # how it ended counts, not who could hear of it
    assert set(result.values()) == {5}


def test_a_reader_that_left_changes_no_exit_code(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 5)
    results = [words for words in VERBS if "--help" not in words]  # click's own, and it says 1
    result = {words: ended(words, config, left(), monkeypatch) for words in results}
    assert set(result.values()) == {0}
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_terminal_that_goes_away_leaves_the_run_its_ending(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 500, teacher="limits = { max_concurrency = 4 }")
    ours, theirs = pty.openpty()
    with running(config, "--limit", 300, stdout=theirs) as run:
        os.close(theirs)
        status = run.until(lambda s: s["answers_stored"] >= 4)
        os.close(ours)
        assert status["answers_stored"] < 250  # the terminal is gone long before the end
        code, _, err = run.end()
    assert code == 10, err
    assert "stdout can't be written" in err
    assert json.loads((tmp_path / "store" / "status.json").read_text())["exit_code"] == 10

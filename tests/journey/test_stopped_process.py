"""Test what is said of a stopped run, of stores that lack a file, and of Ctrl-C during imports."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from tests import commands
from tests.journey.run_process import harvester, running, write_folder

Mock = Callable[..., RunningMock]


@pytest.mark.slow
def test_every_command_says_how_a_stopped_run_goes_on(mock_teacher: Mock, tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher(slots=1, slot_s=0.05).base_url, 400)
    with running(config) as run:
        run.until(lambda s: s["answers_stored"] >= 1)
        run.process.send_signal(signal.SIGSTOP)
        remedy = f"kill -CONT {run.process.pid}"
        try:
            checked = harvester("status", run.store, "--check")
            assert (checked.returncode, checked.stdout.count(remedy), checked.stderr.count(remedy)) == (
                1,
                1,
                1,
            )
            for words, code in ((("pause", run.store), 1), (("seal", run.store), 75), (("run", config), 75)):
                done = harvester(*words)
                assert (done.returncode, remedy in done.stderr) == (code, True), done.stderr
            follower = commands.Command("harvester", ["attach", run.store])
            assert follower.stderr is not None
            lines = [follower.stderr.readline()]
            while remedy not in lines[-1]:
                assert lines[-1], "attach ended, or waits without a word"
                lines.append(follower.stderr.readline())
        finally:
            run.process.send_signal(signal.SIGCONT)
        assert harvester("stop", run.store).returncode == 0
        _, rest = follower.communicate(timeout=240)
        assert follower.returncode == 10, rest  # it followed the run that went on
        assert remedy not in rest


def test_a_store_without_its_status_is_not_one_where_no_run_has_been(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 3)
    store = tmp_path / "store"
    assert harvester("run", config).returncode == 0
    (store / "status.json").unlink()
    for words in (("attach", store), ("status", store, "--check")):
        done = harvester(*words)
        assert done.returncode == 1
        assert "3 answers stored" in done.stdout
        assert "last run ended is not known" in done.stderr
        assert "no run has been here" not in done.stderr


def test_a_plan_does_not_count_a_store_without_its_journal_as_empty(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    """It said `0 already stored`: the run would pay for all again. The run itself refused."""
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 3)
    assert harvester("run", config).returncode == 0
    for path in (tmp_path / "store").glob("journal.db*"):
        path.unlink()
    said = [harvester(verb, config) for verb in ("plan", "run")]
    assert [done.returncode for done in said] == [5, 5]
    assert all("there are sealed answers" in done.stderr for done in said)
    assert mock.totals()["answers"] == 3


def test_a_judge_whose_prompts_are_not_written_says_who_writes_them(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 3)
    assert harvester("run", config).returncode == 0
    judge = tmp_path / "judge.toml"
    text = config.read_text().replace('[prompts]\nfiles = ["*.jsonl"]', '[judge]\ncorpus = "store"')
    judge.write_text(text + '[store]\npath = "judged"\n')
    planned = harvester("plan", judge)
    assert planned.returncode == 2
    assert f"harvester judge {judge} --prompts-only" in planned.stderr
    assert harvester("judge", judge, "--prompts-only").returncode == 0
    assert "3 to send" in harvester("plan", judge).stdout


@pytest.mark.parametrize("program", ["harvester", "trainer"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(program: str, tmp_path: Path) -> None:
    """The first thing that both command lines import gets the signal, and goes on as libraries do."""
    (tmp_path / "typer.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
        "raise ImportError('broken')\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from {program}.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_where_python_can_raise_nothing_is_delivered_again() -> None:
    code = (
        "import signal, time\nfrom harvester.system.quiet_interrupt import deliver_again\ndeliver_again()\n"
        "class Late:\n    def __del__(self):\n        signal.raise_signal(signal.SIGINT)\n"
        "try:\n    Late()\n    time.sleep(3600)\nexcept KeyboardInterrupt:\n    print('again')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "again\n", "")

"""Test `harvester run --detach` and `harvester attach`: real processes, signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harvester.cli import detach
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import read_status
from harvester.store.journal.lock import is_held
from tests import commands
from tests.journey.run_process import harvester, running, write_folder
from tests.waiting import until

Mock = Callable[..., RunningMock]
NO_SYSTEMD = {"PATH": "/nonexistent"}
"""The command finds no systemd-run, whatever this machine has."""


@contextmanager
def detached(config: Path, *flags: object, **environment: str) -> Iterator[dict[str, object]]:
    """A run that was started in the background; it is killed if it lives at the end."""
    done = harvester("run", config, "--detach", "--json", *flags, **{**NO_SYSTEMD, **environment})
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    try:
        yield facts
    finally:
        if is_held(config.parent / "store"):
            os.kill(int(facts["pid"]), signal.SIGKILL)
            until(lambda: not is_held(config.parent / "store"))


@pytest.mark.slow
def test_a_detached_run_goes_on_and_attach_ends_as_it_does(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0, slots=1, slot_s=0.1)
    config = write_folder(tmp_path, mock.base_url, 5000)
    with detached(config, "--limit", "4000") as facts:
        store = tmp_path / "store"
        assert (facts["store"], facts["log"]) == (str(store), str(tmp_path / "store.log"))
        assert os.getsid(int(str(facts["pid"]))) == facts["pid"]  # a session of its own
        assert str(Path(f"/proc/{facts['pid']}/fd/0").readlink()) == os.devnull
        assert is_held(store)
        # A second one fails in the foreground, by the code of the run.
        second = harvester("run", config, "--detach", **NO_SYSTEMD)
        assert (second.returncode, second.stdout) == (75, "")
        assert f"error[locked]: held by pid {facts['pid']}" in second.stderr
        assert "error" not in (tmp_path / "store.log").read_text()  # which is the first one's
        follower = commands.Command("harvester", ["attach", tmp_path, "--json"])
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["state"] == "running"
        assert harvester("stop", store).returncode == 0
        shown, _ = follower.communicate(timeout=240)
        assert follower.returncode == 10
        last = json.loads(shown.splitlines()[-1])
        assert (last["state"], last["exit_code"], last["alive"]) == ("stopped", 10, False)
    log = (tmp_path / "store.log").read_text()
    assert f"{last['answers_stored']:,} answers stored" in log
    assert "Traceback" not in log
    ended = harvester("attach", store)
    assert ended.returncode == 10
    assert "exit code 10" in ended.stdout
    assert str(tmp_path / "store.log") in ended.stdout


def test_a_run_that_never_held_its_store_leaves_no_log(mock_teacher: Mock, tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 3, more='[store]\npath = "a.jsonl"')
    before = sorted(tmp_path.iterdir())
    done = harvester("run", config, "--detach", **NO_SYSTEMD)
    assert done.returncode == 2
    assert "is a file, and a store is a folder" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_of_two_that_start_at_once_each_shows_what_its_own_run_says(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(accuracy=1.0, latency_s=600.0)  # the store is held until both have ended
    config = write_folder(tmp_path, mock.base_url, 5)
    store, log = tmp_path / "store", tmp_path / "store.log"
    log.write_text("of an earlier run\n")
    starting = [
        commands.Command("harvester", ["run", config, "--detach", "--json"], environment=NO_SYSTEMD)
        for _ in range(2)
    ]
    said = {each: each.communicate(timeout=240) for each in starting}
    (winner,) = [each for each in starting if each.returncode == 0]
    (loser,) = [each for each in starting if each.returncode == 75]
    pid = json.loads(said[winner][0])["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_held(store))
    assert f"error[locked]: held by pid {pid}" in said[loser][1]
    text = log.read_text()
    assert "error" not in text
    assert text.startswith("of an earlier run\n")
    shown = said[winner][1]
    assert shown.startswith("teacher mock-teacher at")
    assert text.partition("\n")[2].startswith(shown)
    assert sorted(path.name for path in tmp_path.glob("*.log*")) == ["store.log"]


@pytest.mark.slow
def test_a_run_that_cant_start_fails_in_the_foreground(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY_OF_THE_TEST", "sk-of-the-test")
    mock = mock_teacher(accuracy=1.0, require_key_env="A_KEY_OF_THE_TEST")
    refused = write_folder(tmp_path, mock.base_url, 5)
    done = harvester("run", refused, "--detach", **NO_SYSTEMD)
    assert (done.returncode, "error[" in done.stderr) == (4, True)  # the teacher refuses: no key
    assert not is_held(tmp_path / "store")
    text = refused.read_text()
    for wrong, code in (
        (text.replace('terms = "mock-teacher"', 'terms = "openai"'), 77),
        (text.replace("max_tokens", "max_token"), 2),
    ):
        refused.write_text(wrong)
        done = harvester("run", refused, "--detach", "--json", **NO_SYSTEMD)
        assert (done.returncode, done.stdout) == (code, "")
        assert "error[" in done.stderr
        assert "remedy" in done.stderr
    (tmp_path / "file").write_text("")
    refused.write_text(text + '[store]\npath = "file/store"\n')
    done = harvester("run", refused, "--detach", **NO_SYSTEMD)
    assert (done.returncode, "error[store]: the log" in done.stderr) == (5, True)


@pytest.mark.slow
def test_one_that_has_little_to_do_says_that_it_has_ended(mock_teacher: Mock, tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher(accuracy=1.0).base_url, 3)
    assert harvester("run", config).returncode == 0
    again = harvester("run", config, HARVESTER_RUN_DETACH="1", HARVESTER_RUN_JSON="1", **NO_SYSTEMD)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["exit_code"] == 0


def test_attach_follows_any_run_and_ctrl_c_leaves_it(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(accuracy=1.0, slots=1, slot_s=0.1)
    config = write_folder(tmp_path, mock.base_url, 4000)
    assert harvester("attach", tmp_path / "store").returncode == 2  # there is none yet
    with running(config) as run:
        run.until(lambda status: status.get("answers_stored", 0) > 2)
        follower = commands.Command("harvester", ["attach", tmp_path / "store", "--json"])
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["state"] == "running"
        follower.send_signal(signal.SIGINT)
        _, said = follower.communicate(timeout=240)
        assert follower.returncode == 130
        assert "the harvest goes on" in said
        assert run.process.poll() is None
        follower = commands.Command("harvester", ["attach", tmp_path / "store"])
        assert follower.stderr is not None
        assert "4,000 rows" in follower.stderr.readline()  # at once
        run.process.kill()
        shown, said = follower.communicate(timeout=240)
        assert follower.returncode == 1
        assert "died" in shown
        assert "the run died" in said


def test_the_log_of_a_detached_run_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detach, "MAX_LOG_BYTES", 1000)
    log = tmp_path / "store.log"
    script = (
        "import os\nfrom harvester.cli import detach\ndetach.MAX_LOG_BYTES = 1000\n"
        f"os.environ[detach.LOG_VARIABLE] = {str(log)!r}\n"
        "own = detach.OwnLog()\nassert detach.LOG_VARIABLE not in os.environ\n"
        "for number in range(300):\n    own.bound()\n    print('line', number, flush=True)\n"
    )
    with tempfile.TemporaryFile() as file:
        subprocess.run([sys.executable, "-c", script], stdout=file, stderr=file, check=True)
    assert log.stat().st_size <= 1020
    assert (tmp_path / "store.log.1").stat().st_size <= 1020
    assert log.read_text().splitlines()[-1] == "line 299"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.log", "store.log.1"]


@pytest.mark.slow
def test_a_manager_of_the_user_gets_a_scope(mock_teacher: Mock, tmp_path: Path) -> None:
    """With commands in place of systemd's: what they are asked, and that the run is what they start."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "systemctl": '[ "$1" = --user ] && echo running || echo offline',
        "loginctl": "echo Linger=no",
        "systemd-run": f'echo "$@" > {tmp_path}/asked\n'
        + 'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    mock = mock_teacher(accuracy=1.0, slots=1, slot_s=0.2)
    config = write_folder(tmp_path, mock.base_url, 5000)
    with detached(config, PATH=f"{tools}:{os.environ['PATH']}") as facts:
        asked = (tmp_path / "asked").read_text().split()
        assert {"--user", "--scope", "--collect", f"--unit={facts['unit']}"} <= set(asked)
        assert read_status(tmp_path / "store")["pid"] == facts["pid"]
        assert harvester("stop", tmp_path / "store").returncode == 0
    assert harvester("attach", tmp_path / "store").returncode == 10

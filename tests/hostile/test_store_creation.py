"""Test that a half-made store is completed by the next run, and that of several first runs one runs."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.journal import sqlite
from tests.faults.bench import run_harvest
from tests.harvester.killed_runs import ROOT, quick_folder, write_config
from tests.waiting import until


@pytest.mark.slow
def test_a_kill_at_any_system_call_of_the_creation_leaves_a_store_that_the_next_run_makes(
    faulty_library: Path,
) -> None:
    with quick_folder() as folder:
        out = subprocess.run(
            [sys.executable, "-m", "tests.hostile.store_births", str(folder)],
            cwd=ROOT,
            env={**os.environ, "LD_PRELOAD": str(faulty_library)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    births = [json.loads(line) for line in out.stdout.splitlines()]
    assert births, out.stderr
    *killed, complete = births
    assert len(killed) > 15
    assert {status for _, status, *_ in killed} == {-signal.SIGKILL}
    assert complete[1] == 0
    for number, _, repaired, again, files in births:
        assert (repaired, again) == (0, 0), (number, out.stderr)
        assert files == ["LOCK", "journal.db"]  # nothing half made is left behind


def run(config: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harvester", "run", str(config)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def empty(journal: Path) -> None:
    journal.touch()


def only_a_header(journal: Path) -> None:
    """What an earlier version left after a kill: a database of one page, in WAL mode, without a table."""
    with closing(sqlite3.connect(journal)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE x (y)")
        connection.execute("DROP TABLE x")
        connection.commit()


def under_way(journal: Path) -> None:
    """The same, with the rollback journal of the switch to WAL mode still beside it."""
    only_a_header(journal)
    journal.with_name("journal.db-journal").write_bytes(b"")


@pytest.mark.parametrize("left", [empty, only_a_header, under_way])
def test_a_half_made_journal_of_an_earlier_version_is_made_whole(
    left: Callable[[Path], None], mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    left(tmp_path / "store" / "journal.db")
    assert run_harvest(mock_teacher(), tmp_path).exit_code == 0
    assert sqlite.has_journal(tmp_path / "store")


@pytest.mark.slow  # four processes of the command line
def test_first_runs_started_together_end_complete_once_and_locked_else(
    mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = mock_teacher()
    mock.set_faults([{"action": "status", "status": 503, "retry_after": 1}])  # nobody ends before the others
    config = write_config(tmp_path, mock.base_url, 1)
    runs = [run(config) for _ in range(4)]
    until(lambda: sum(process.poll() is not None for process in runs) == 3)
    mock.set_faults([])
    text = [process.communicate(timeout=240)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 75, 75, 75], text

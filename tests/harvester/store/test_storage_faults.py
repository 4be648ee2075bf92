"""Let the disk fail at the n-th open, write, fsync or rename: the error is named, and nothing is lost.

A small library is preloaded into the writing process, so SQLite and pyarrow meet the fault where they
would meet it: in the call to the operating system.
"""

from __future__ import annotations

import errno
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.errors import StoreError
from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from tests.harvester import faulty_disk
from tests.harvester.store_rows import key_of

ROOT = Path(__file__).resolve().parents[3]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EROFS, errno.ENOENT)
SCRIPT = """
import os, signal, sys
from harvester.errors import StoreError
from tests.harvester import store_writer
store_writer.ANSWERS, store_writer.SEAL_EVERY = 40, 20
try:
    store_writer.main()
except StoreError as error:
    print("error", type(error).__name__, error.exit_code, flush=True)
    os._exit(error.exit_code)
"""


CLOSING_SCRIPT = """
import os, sys
from pathlib import Path
from harvester.errors import StoreError
from tests.harvester.store_rows import fill, open_store
journal = open_store(Path(sys.argv[1]))
try:
    for number in range(40):
        fill(journal, [number])
except StoreError as error:
    journal.close()
    os._exit(error.exit_code)
"""


def run_writer(
    store: Path,
    library: Path,
    call: str,
    nth: int,
    number: int,
    stays: bool,
    log: Path | None = None,
    script: str = SCRIPT,
) -> tuple[int, set[int], str]:
    """Run the writer on a failing disk; return exit code, numbers acknowledged as stored, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(store), "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=faulty_disk.environment(library, store, call, nth, number, stays, log),
    )
    lines = done.stdout.splitlines()
    return done.returncode, {int(line) for line in lines if line.isdigit()}, done.stdout + done.stderr


def cases(count: int) -> list[tuple[str, int, int, bool]]:
    rng = random.Random(5)
    spread = {"open": 25, "write": 90, "fsync": 30, "rename": 2}
    every = [
        (call, nth, number, stays)
        for call, most in spread.items()
        for nth in range(1, most + 1)
        for number in ERRORS
        for stays in (False, True)
    ]
    return rng.sample(every, count)


def trial(store: Path, library: Path, call: str, nth: int, number: int, stays: bool) -> bool:
    """Whether the fault was met; asserts what must hold either way."""
    code, stored, text = run_writer(store, library, call, nth, number, stays)
    assert "Traceback" not in text, text
    assert code in {0, StoreError.exit_code}, text
    if stored:
        held = {sample.key for sample in Corpus.open(store).samples(["key"])}
        assert {key_of(n).hex() for n in stored} <= held
    with Journal.open(store) as journal:  # the next process finishes what this one could not
        seal(journal, store, target_bytes=1, everything=True)
    assert Corpus.open(store).verify() == []
    return code != 0


@pytest.mark.parametrize(
    "count", [pytest.param(16, marks=pytest.mark.slow), pytest.param(400, marks=pytest.mark.torture)]
)
def test_a_failing_disk_is_a_named_stop_and_loses_nothing(tmp_path, faulty_library, count):
    met = 0
    for number, case in enumerate(cases(count)):
        met += trial(tmp_path / f"store-{number}", faulty_library, *case)
    assert met >= count // 3


@pytest.mark.parametrize("nth", [15, 40])
def test_after_a_failed_fsync_the_journal_is_not_written_again(tmp_path, faulty_library, nth):
    store, log = tmp_path / "store", tmp_path / "later"
    code, _, text = run_writer(store, faulty_library, "fsync", nth, errno.EIO, False, log, CLOSING_SCRIPT)
    assert code == StoreError.exit_code, text
    later = log.read_text().splitlines() if log.exists() else []
    assert [line for line in later if "journal.db" in line and "-shm" not in line] == []


def test_a_full_file_system_is_named_and_resumes_when_there_is_space(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        store = place / "store"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.replace("= 40, 20", "= 600, 200"), str(store), "0"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 5, done.stderr
        stored = {int(line) for line in done.stdout.splitlines() if line.isdigit()}
        keys = {sample.key for sample in Corpus.open(store).samples(["key"])}
        assert stored
        assert {key_of(n).hex() for n in stored} <= keys
        subprocess.run(["mount", "-o", "remount,size=40m", str(place)], check=True)
        with Journal.open(store) as journal:
            seal(journal, store, target_bytes=1, everything=True)
        assert Corpus.open(store).verify() == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_low_disk_stops_before_a_request_is_sent(
    mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = mock_teacher()
    (tmp_path / "p.jsonl").write_text('{"prompt": "What is 1 + 2?"}\n')
    (tmp_path / "harvest.toml").write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        '[prompts]\nfiles = ["p.jsonl"]\n[store]\nmin_free_mib = 1e9\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "harvester", "run", str(tmp_path / "harvest.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 5
    assert "min_free_mib" in done.stderr
    assert mock.totals()["requests"] == 0

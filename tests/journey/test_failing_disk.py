"""Run the whole command on a disk that fails at the n-th open, write, fsync or rename in the store's folder.

Whatever the disk refuses: a documented exit code and no traceback, nothing billed that is neither held nor
listed as possibly billed, and the next run on a healthy disk ends with exactly what was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from tests.harvester import faulty_disk
from tests.harvester.store_rows import open_store, without_outcome
from tests.journey.run_process import harvester, write_folder

Mock = Callable[..., RunningMock]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EROFS)
CALLS = {"open": 40, "write": 120, "fsync": 30, "rename": 8}
"""How many calls of each kind a short run makes, about."""
ROWS = 24
NAMED = (0, 5)


def cases(count: int) -> list[tuple[str, int, int, bool]]:
    every = [
        (call, nth, number, stays)
        for call, most in CALLS.items()
        for nth in range(1, most + 1)
        for number in ERRORS
        for stays in (False, True)
    ]
    chosen = random.Random(8).sample(every, count - len(CALLS))
    return [*((call, 1, errno.ENOSPC, True) for call in CALLS), *chosen]


def held_and_doubtful(store: Path) -> tuple[int, int]:
    """Answers held, and attempts that were possibly billed."""
    if not (store / "journal.db").exists():
        return 0, 0
    with Journal.open(store) as journal:
        totals = journal.totals()
        in_flight = len(without_outcome(journal)) - len(without_outcome(journal, in_flight=False))
        return totals.answers, totals.possibly_billed + in_flight


@pytest.mark.parametrize(
    "count", [pytest.param(4, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.torture)]
)
def test_a_run_on_a_failing_disk_ends_by_name_and_the_next_one_completes_it(
    mock_teacher: Mock, tmp_path: Path, faulty_library: Path, count: int
) -> None:
    stopped = 0
    for number, (call, nth, code, stays) in enumerate(cases(count)):
        mock = mock_teacher()
        folder = tmp_path / str(number)
        folder.mkdir()
        config = write_folder(folder, mock.base_url, ROWS, teacher="limits = { max_concurrency = 4 }")
        store = folder / "store"
        fault = faulty_disk.environment(faulty_library, store, call, nth, code, stays)
        case = f"{call} {nth} {errno.errorcode[code]} {'stays' if stays else 'once'}"

        done = subprocess.run(
            [sys.executable, "-m", "harvester", "run", str(config)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, **fault},
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in NAMED, f"{case}: {done.returncode} {done.stderr}"
        held, doubtful = held_and_doubtful(store)
        assert mock.totals()["requests"] <= held + doubtful, case
        stopped += done.returncode == 5

        healed = harvester("run", config)
        assert healed.returncode == 0, f"{case}: {healed.stderr}"
        corpus = Corpus.open(store)
        samples = sorted(sample.messages[-1]["content"] for sample in corpus.samples())
        assert samples == [f"What is {number} + 30?" for number in range(10, 10 + ROWS)], case
        assert corpus.verify() == [], case
        ledger = mock.totals()
        assert ledger["requests"] - ledger["bodies"] <= doubtful, case
    print(f"{count} runs, {stopped} of them stopped by their fault")
    assert stopped >= count // 3


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system without any room; skips the test where none can be mounted."""
    place = tmp_path / "full"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        with contextlib.suppress(OSError):
            (place / "filler").write_bytes(b"x" * 64_000)
        with pytest.raises(OSError, match="No space"):
            (place / "more").write_bytes(b"x")
        (place / "more").unlink()
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize(
    "words",
    [
        ("init", "FULL/new"),
        ("import", "FULL/../p.jsonl", "--out", "FULL/prompts.jsonl"),
        ("report", "FULL/../store", "--out", "FULL/report.html"),
        ("metrics", "FULL/../store", "--out", "FULL/metrics.prom"),
    ],
    ids=lambda words: words[0],
)
def test_a_full_disk_is_no_wrong_name(full: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "p.jsonl").write_text('{"instruction": "What is 1 + 2?", "output": "3"}\n')
    with open_store(tmp_path / "store"):
        pass
    done = harvester(*(word.replace("FULL", str(full)) for word in words))
    assert (done.returncode, "error[store_full]: the disk is full" in done.stderr) == (5, True), done.stderr
    assert "on another disk" in done.stderr
    assert [path.name for path in full.rglob("*") if path.is_file()] == ["filler"]

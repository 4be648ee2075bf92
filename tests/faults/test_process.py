"""Test faults of the process and its machine: signals, stops, open files, memory, clocks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock, start_process
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.system.failpoints import VARIABLE
from tests.faults.bench import Hasty, run_harvest
from tests.harvester.store_rows import without_outcome
from tests.journey.run_process import RunProcess, running, write_folder

ROOT = Path(__file__).resolve().parents[2]

Mock = Callable[..., RunningMock]
FOUR = "[teacher.limits]\nmax_concurrency = 4\n"


def stored(store: Path) -> int:
    return sum(1 for _ in Corpus.open(store).samples(["key"]))


def until_asked(mock: RunningMock, run: RunProcess, times: int) -> None:
    """Return when the teacher has so many requests in the works or answered."""
    while mock.state()["received"] < times:
        assert run.process.poll() is None, run.process.communicate()
        time.sleep(0.02)


def test_row_47_one_signal_waits_for_what_is_paid(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.3)
    with running(write_folder(tmp_path, mock.base_url, 400, teacher=FOUR)) as run:
        until_asked(mock, run, 7)
        run.signal(signal.SIGTERM)
        ended, stdout, _ = run.end()
    assert ended == 143
    assert "resume with: harvester run" in stdout
    billed = mock.totals()
    assert 0 < billed["requests"] < 400
    assert (billed["cut"], stored(tmp_path / "store")) == (0, billed["requests"])


def test_row_48_a_second_signal_ends_at_once_and_leaves_a_whole_store(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(faults=[{"action": "silence", "after": 8}], latency_s=0.02)
    config = write_folder(tmp_path, mock.base_url, 400, teacher=FOUR, more="[run]\ngrace_s = 600\n")
    with running(config) as run:
        until_asked(mock, run, 12)
        run.signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits: these four may be paid for
            run.process.wait(0.5)
        run.signal(signal.SIGINT)
        ended, _, _ = run.end()
    assert ended == 130
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        assert (journal.totals().answers, len(without_outcome(journal))) == (8, 4)


def test_row_49_a_closed_terminal_and_a_closed_pipe_end_no_run(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.05)
    reader, writer = os.pipe()
    config = write_folder(tmp_path, mock.base_url, 60, teacher=FOUR)
    with running(config, "--json", stdout=writer) as run:
        os.close(writer)
        os.close(reader)  # as `| head` does
        until_asked(mock, run, 5)
        run.signal(signal.SIGHUP)
        ended, _, _ = run.end()
    assert ended == 0
    assert stored(tmp_path / "store") == mock.totals()["requests"] == 60


@pytest.mark.slow  # 3 s of waiting
def test_row_52_a_stopped_process_saves_up_no_burst(mock_teacher: Mock, tmp_path: Path) -> None:
    """The teacher refuses what comes faster than 20 a second, with eight to spare.

    A teacher that gets no time on a busy machine finds many requests at once, too: that is tried again.
    """
    refused = []
    while len(refused) < 4 and 0 not in refused:
        mock = mock_teacher(rpm=1200, burst_s=0.4)
        folder = tmp_path / str(len(refused))
        folder.mkdir()
        limits = "[teacher.limits]\nrequests_per_minute = 1150\n"
        with running(write_folder(folder, mock.base_url, 40, teacher=limits)) as run:
            until_asked(mock, run, 9)
            run.signal(signal.SIGSTOP)
            time.sleep(1.0)  # the fault itself: twenty requests' worth of time
            run.signal(signal.SIGCONT)
            ended, _, _ = run.end()
        assert (ended, stored(folder / "store")) == (0, 40)
        refused.append(mock.state()["statuses"].get("429", 0))
    assert 0 in refused, refused


def test_row_45_the_window_keeps_to_the_limit_of_open_files() -> None:
    code = """
import resource, sys
from harvester.system import open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 100))
print(open_files.connections_allowed(512), end=" ")
print(open_files.connections_allowed(8), *resource.getrlimit(resource.RLIMIT_NOFILE))
from harvester.system.clock import SystemClock
from harvester.config.config import HarvestConfig
from harvester.teacher.policies import build_policies
from harvester.teacher.limiter.limits import Charge
from harvester.observe.counters import PassLimits
teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "limits": {"max_concurrency": 512}}
config = HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": ["p"]}})
(limiter,) = build_policies(config, PassLimits(), SystemClock()).limiters.values()
limiter.window.size = limiter.window.ceiling
while not limiter.window.is_full:
    limiter.enter(Charge(1, 1), 0.0)
print(limiter.waiting_reason(Charge(1, 1), 0.0))
print(*limiter.learned)
limiter.window.set_ceiling(8)  # a part of it, in a fleet
print(limiter.learned)
limiter.window.set_ceiling(36)
print(*limiter.learned)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    limits, reason, learned, of_part, again = done.stdout.splitlines()
    assert limits == "36 8 100 100", done.stderr
    assert "36 in flight" in reason
    assert "open files" in reason
    assert learned == "36 in flight, the most that the limit of open files allows"  # in status, also unasked
    assert (of_part, again) == ("[]", learned)


@pytest.mark.slow
def test_row_45_at_runtime_a_shortage_lowers_the_window_and_costs_no_row(tmp_path: Path) -> None:
    blind = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "from harvester.system import open_files; open_files.connections_allowed = lambda wanted: wanted\n"
        "from harvester.teacher.retry import RetryBudget; RetryBudget.take = lambda self, now: 1e6"
    )
    # Before the first answer the window grows with what was sent: late answers let it pass the limit on a
    # busy machine too. The retry budget spares a failing teacher; a retry that took from it would never end.
    with start_process("--latency", "1") as mock:
        teacher = "[teacher.limits]\nmax_concurrency = 256\n"
        more = "[run]\nmax_attempts = 1\n"
        config = write_folder(tmp_path, mock.base_url, 120, teacher=teacher, more=more)
        done = _run(blind, config)
        assert done.returncode == 0, done.stderr
        assert stored(tmp_path / "store") == mock.totals()["requests"] == 120
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        totals = journal.totals()
    assert totals.refunds > 0, "the fault never fired"
    assert (totals.dead, totals.possibly_billed) == (0, 0)


@pytest.mark.slow
def test_row_45_a_shortage_that_lasts_is_tried_no_faster_than_the_retry_budget_allows(tmp_path: Path) -> None:
    shortage = (
        "import errno, os\n"
        "from httpx_aiohttp import AiohttpTransport\n"
        "from harvester.teacher.retry import RetryBudget\n"
        "send = AiohttpTransport.handle_async_request\n"
        "async def refused(self, request):\n"
        "    if request.method == 'GET':\n"
        "        return await send(self, request)\n"
        "    raise OSError(errno.ENFILE, 'Too many open files in system')\n"
        "AiohttpTransport.handle_async_request = refused\n"
        "RetryBudget.take = lambda self, now: os._exit(7)"
    )
    with start_process() as mock:
        done = _run(shortage, write_folder(tmp_path, mock.base_url, 3))
        assert done.returncode == 7, done.stderr
        assert mock.totals()["requests"] == 0


def _run(before: str, config: Path) -> subprocess.CompletedProcess[str]:
    code = f"{before}\nimport runpy, sys\nsys.argv = ['harvester', 'run', {str(config)!r}]\n"
    code += "runpy.run_module('harvester', run_name='__main__')\n"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_row_46_prompts_are_streamed_whatever_their_size(tmp_path: Path, mock_teacher: Mock) -> None:
    """90 MB of prompts are walked through while the process grows by a chunk of them at most."""
    mock = mock_teacher()
    folder = write_folder(tmp_path, mock.base_url, 1, teacher=FOUR).parent
    filler = "x" * 60_000
    with (folder / "b.jsonl").open("w") as out:
        out.writelines(f'{{"prompt": "{n} {filler}"}}\n' for n in range(1500))
    code = f"""
import asyncio
from pathlib import Path
import pyarrow as pa
from harvester.api.http import client
from harvester.run import job
from harvester.config.overrides import Overrides
from harvester.run.prepare import prepare
from harvester.store.maintain import seal_task
from tests.peak_memory import peak_kib
pa.array([""])  # what is loaded once is no cost of a prompt
before = peak_kib()
prepared = prepare(Path({str(folder / "harvest.toml")!r}), Overrides(rows=8))
summary = asyncio.run(job.run(prepared, lambda _: None))
peak = peak_kib()
print(summary.rows_total, summary.counts.answers_stored, peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows, answers, grown_kib = map(int, done.stdout.split())
    assert (rows, answers) == (1501, 8)
    assert grown_kib < 88_000, grown_kib


class Jumpy(Hasty):
    """A calendar that jumps a day forth or back at every look; the monotonic clock goes on as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def wall(self) -> float:
        self.looks += 1
        return super().wall() + 86_400 * (-1) ** self.looks


def test_row_41_a_jumping_calendar_moves_no_wait(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    clock = Jumpy()
    faults = [
        {"action": "status", "status": 429, "headers": {"retry-after": "2"}, "first": 4},
        {"action": "status", "status": 500, "every": 7},
    ]
    prompts = [f"What is {n} + 4?" for n in range(40)]
    limits = {"requests_per_minute": 60_000, "max_concurrency": 4}
    ended = run_harvest(
        mock,
        tmp_path,
        faults,
        prompts=prompts,
        clock=clock,
        teacher={"limits": limits},
        run={"max_attempts": 9},
    )
    assert clock.looks > 40
    assert ended.fired > 4
    assert (ended.exit_code, ended.totals.answers, ended.billed["requests"]) == (0, 40, 40)


class Suspended(Hasty):
    """The machine sleeps ten minutes after a few looks at the clock: its monotonic clock leaps too."""

    def __init__(self) -> None:
        super().__init__(speed=1.0)
        self.looks = 0

    def now(self) -> float:
        self.looks += 1
        return super().now() + (600.0 if self.looks > 200 else 0.0)


def test_row_41_a_suspended_machine_wakes_without_a_burst(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(rpm=3000, burst_s=0.5)
    clock = Suspended()
    prompts = [f"What is {n} + 4?" for n in range(60)]
    limits = {"requests_per_minute": 2900}
    ended = run_harvest(mock, tmp_path, prompts=prompts, clock=clock, teacher={"limits": limits})
    assert clock.looks > 200
    assert (ended.exit_code, ended.totals.answers) == (0, 60)
    assert mock.state()["statuses"].get("429", 0) == 0


@pytest.mark.slow
def test_row_46_memory_that_runs_out_parks_the_run_and_loses_no_answer(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 40, teacher=FOUR)
    command = [sys.executable, "-m", "harvester", "run", str(config)]
    armed = {**os.environ, VARIABLE: "completion.parse:9:memory"}
    done = subprocess.run(command, env=armed, capture_output=True, text=True, timeout=240, check=False)
    stderr = done.stdout + done.stderr
    assert done.returncode == 10, stderr
    assert "memory ran out" in stderr
    assert "resume with: harvester run" in stderr
    assert "Traceback" not in stderr
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        totals = journal.totals()
    # All that the teacher charged is held but for the answer that found no room, and that one is known.
    assert totals.possibly_billed == 1
    assert stored(tmp_path / "store") == totals.answers == mock.totals()["requests"] - 1
    assert 8 <= totals.answers < 40
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert (again.returncode, stored(tmp_path / "store")) == (0, 40)
    assert mock.totals()["requests"] == 41


def test_what_a_killed_run_left_open_is_not_sent_again_where_that_is_asked(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(faults=[{"action": "silence", "after": 8}])
    more = "[run]\nretry_possibly_billed = false\nmax_failed = 4\n"
    config = write_folder(tmp_path, mock.base_url, 40, teacher=FOUR, more=more)
    with running(config) as run:
        until_asked(mock, run, 12)
        run.signal(signal.SIGKILL)
        run.end()
    mock.set_faults([])
    with running(config) as run:
        ended, stdout, _ = run.end()
    assert ended == 0, stdout
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        totals = journal.totals()
    assert (totals.answers, totals.dead, totals.errors) == (36, 4, {})

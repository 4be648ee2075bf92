"""Test a long run from the operator's side: real signals, time limits, hours, and files that grow."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.observe.sd_notify import ServiceNotifier
from harvester.observe.status import current_status
from harvester.prompts import completed_files
from harvester.prompts.completed_files import Finished
from harvester.run import job
from harvester.run.control import client
from harvester.run.prepare import prepare
from harvester.store.journal.journal import Journal
from tests.journey.run_process import harvester, running, write_folder, write_prompts

Mock = Callable[..., RunningMock]
FOUR = "[teacher.limits]\nmax_concurrency = 4\n"
SILENT = [{"action": "silence"}]


def notices(line: socket.socket) -> list[str]:
    result = []
    line.setblocking(False)
    while True:
        try:
            result.append(line.recv(4096).decode())
        except BlockingIOError:
            return result


def test_a_signal_drains_seals_and_says_how_to_go_on_and_systemd_hears_it(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(latency_s=0.5)
    config = write_folder(tmp_path, mock.base_url, 500, teacher=FOUR)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0harvester-test-" + str(os.getpid()))
        address = "@harvester-test-" + str(os.getpid())
        with running(config, NOTIFY_SOCKET=address, WATCHDOG_USEC="1500000") as run:
            run.until(lambda s: s["answers_stored"] >= 4 and s["in_flight"] == 4)
            run.signal(signal.SIGHUP)  # the terminal went: no reason to end
            run.signal(signal.SIGTERM)
            code, out, _ = run.end()
        heard = notices(manager)
    assert code == 143
    assert out.startswith("interrupted:")
    assert f"resume with: harvester run {config}" in out
    status = current_status(tmp_path / "store")
    assert (status["state"], status["exit_code"], status["possibly_billed"]) == ("interrupted", 143, 0)
    assert status["held"] == mock.totals()["answers"] >= 8  # those on the wire were awaited, and no more sent
    assert list((tmp_path / "store" / "shards").glob("part-*.parquet"))
    assert heard[0] == "READY=1"
    assert any(entry.startswith("STATUS=running: ") and entry.endswith("\nWATCHDOG=1") for entry in heard)
    assert any(entry.startswith("STOPPING=1\nEXTEND_TIMEOUT_USEC=") for entry in heard)


@pytest.mark.parametrize(
    ("signals", "flags", "ending", "code"),
    [
        pytest.param((signal.SIGINT, signal.SIGINT), (), "aborted", 130, marks=pytest.mark.slow),
        ((signal.SIGTERM, signal.SIGINT), (), "aborted", 143),
        ((signal.SIGTERM,), ("--grace", "0.2"), "interrupted", 143),
    ],
)
def test_a_second_signal_or_the_end_of_the_grace_gives_up_what_is_on_the_wire_and_nothing_else(
    mock_teacher: Mock,
    tmp_path: Path,
    signals: tuple[signal.Signals, ...],
    flags: tuple[str, ...],
    ending: str,
    code: int,
) -> None:
    mock = mock_teacher(latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 400, teacher=FOUR)
    store = tmp_path / "store"
    with running(config, *flags) as run:
        run.until(lambda s: s["answers_stored"] >= 10)
        mock.set_faults(SILENT)
        # A rule fires when its request arrives, and the reply is billed after the latency.
        run.until(lambda s: (sum(mock.fired().values()), mock.totals()["cut"]) == (4, 4))
        for number in signals[:-1]:
            run.signal(number)
            run.until(lambda s: s["state"] == "draining")
        run.signal(signals[-1])
        ended, out, _ = run.end()
    assert (ended, out.partition(":")[0]) == (code, ending)
    status, paid = current_status(store), mock.totals()["answers"]
    # The silent ones were billed, as the teacher's ledger knows and ours suspects.
    assert (status["held"], status["possibly_billed"], status["state"]) == (paid - 4, 4, ending)
    if signals[0] == signal.SIGINT:  # and the next life pays for nothing again
        mock.set_faults([])
        assert harvester("run", config).returncode == 0
        assert (current_status(store)["held"], mock.totals()["answers"]) == (400, 404)


@pytest.mark.slow
def test_a_run_goes_on_when_its_output_is_not_read(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 30, teacher=FOUR)
    run = f"{sys.executable} -m harvester run {config}"
    done = subprocess.run(["sh", "-c", f"exec {run} --limit 10 <&- >&- 2>&-"], timeout=240)
    assert done.returncode == 10
    readable, writable = os.pipe()
    os.close(readable)  # `harvester run ... | head`, and head has gone
    try:
        done = subprocess.run([*run.split(), "--json"], stdout=writable, stderr=writable, timeout=240)
    finally:
        os.close(writable)
    assert done.returncode == 0
    assert harvester("verify", tmp_path / "store").returncode == 0
    assert current_status(tmp_path / "store")["held"] == 30


def test_before_the_first_request_sigterm_ends_with_143_and_a_hang_up_is_ignored() -> None:
    code = "from harvester.run import signals; signals.end_at_once(); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)  # the lower number: it is delivered first
        process.terminate()
        assert process.wait(240) == 143  # not -15: also process 1 of a container hears it


@pytest.mark.parametrize(
    ("signals", "ending"),
    [((signal.SIGTERM,), "interrupted"), ((signal.SIGINT, signal.SIGTERM), "aborted")],
)
def test_a_signal_that_comes_before_the_pass_is_not_lost(
    mock_teacher: Mock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signals: tuple[signal.Signals, ...],
    ending: str,
) -> None:
    mock = mock_teacher()
    recall = completed_files.recall

    def interrupted(journal: Journal, digest: bytes | None) -> Finished | None:
        for number in signals:
            os.kill(os.getpid(), number)
        return recall(journal, digest)

    monkeypatch.setattr(completed_files, "recall", interrupted)
    config = write_folder(tmp_path, mock.base_url, 5)
    ended = asyncio.run(job.run(prepare(config), lambda _: None))
    assert (ended.ending, mock.totals()["requests"]) == (ending, 0)
    assert ended.exit_code - 128 in signals


@pytest.mark.parametrize(
    "still_s", [pytest.param(2.0, marks=pytest.mark.slow), pytest.param(150.0, marks=pytest.mark.long)]
)
def test_after_a_stop_of_the_process_requests_do_not_come_all_at_once(
    mock_teacher: Mock, tmp_path: Path, still_s: float
) -> None:
    """A teacher that gets no time on a busy machine finds many requests at once, too: that is tried again."""
    met: list[tuple[list[float], int]] = []
    while len(met) < 3 and (not met or not _came_in_order(*met[-1])):
        mock = mock_teacher(latency_s=0.01, rpm=2400)
        folder = tmp_path / str(len(met))
        folder.mkdir()
        limits = "[teacher.limits]\nmax_concurrency = 64\nrequests_per_minute = 2400\n"
        with running(write_folder(folder, mock.base_url, 2000, teacher=limits)) as run:
            before = run.until(lambda s: s["answers_stored"] >= 40)["answers_stored"]
            run.signal(signal.SIGSTOP)
            time.sleep(still_s)  # the fault itself: two seconds of standing still are eighty requests
            run.signal(signal.SIGCONT)
            run.until(lambda s, stored=before: s["answers_stored"] >= stored + 120)
            client.tell(run.store, "stop")
            assert run.end()[0] == 10
        times = sorted(entry["at"] for entry in mock.ledger()["entries"])
        at, longest = max(enumerate(b - a for a, b in pairwise(times)), key=lambda gap: gap[1])
        assert longest >= still_s - 0.5
        met.append((times[at + 1 :], mock.state()["statuses"].get("429", 0)))
    assert _came_in_order(*met[-1]), met


def _came_in_order(times: Sequence[float], refused: int) -> bool:
    """Whether 40 a second came from the first time on, and what was saved: a quarter of a second, and one."""
    spans = (0.25, 0.5, 1.0)
    counts = [sum(at < times[0] + span_s for at in times) for span_s in spans]
    return not refused and all(n <= 40 * s + 10 + 5 for n, s in zip(counts, spans, strict=True))


def later(hours: float) -> datetime:
    return datetime.now(UTC) + timedelta(hours=hours)


@pytest.mark.slow  # 4 s of waiting
def test_limits_of_time_end_with_10_and_resume(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 3000, teacher=FOUR)
    for flags, ending in (
        (("--max-runtime", "1s"), "runtime"),
        (("--finish-by", (datetime.now(UTC) + timedelta(seconds=4)).isoformat()), "deadline"),
        (("--finish-by", later(-1).isoformat()), "deadline"),
    ):
        answers = mock.totals()["answers"]
        done = harvester("run", config, *flags, "--json")
        assert done.returncode == 10, done.stderr
        stdout = json.loads(done.stdout)
        assert stdout["ending"] == ending
        assert mock.totals()["answers"] - answers == stdout["answers_stored"]
    assert "has passed" in stdout["detail"]
    assert (stdout["requests_sent"], stdout["from_cache"]) == (0, 0)  # it looked at nothing
    assert harvester("run", config, "--finish-by", "tomorrow").returncode == 2


def test_outside_its_hours_a_run_sends_nothing_and_a_watching_one_waits(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    hours = f'[schedule]\nhours = ["{later(6):%H:%M}-{later(7):%H:%M} UTC"]\n'
    config = write_folder(tmp_path, mock.base_url, 10, more=hours)
    done = harvester("run", config)
    assert (done.returncode, done.stdout.partition(":")[0]) == (10, "hours")
    assert "outside the opening hours; opens" in done.stdout
    with running(config, "--watch") as run:
        held = run.until(lambda s: s["state"] == "on hold")
        assert held["waiting"].startswith("outside the opening hours; opens")
        assert harvester("status", run.store, "--check").returncode == 0
        reply = client.tell(run.store, "resume")  # the operator can't open what the hours closed
        assert "still held: outside" in reply["said"]
        run.signal(signal.SIGTERM)
        assert run.end()[0] == 143
    assert mock.totals()["answers"] == 0


@pytest.mark.slow
def test_a_watching_run_takes_files_that_appear_or_grow_and_forgives_a_half_written_line(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 3)
    with running(config, "--watch") as run:
        idle = run.until(lambda s: s["answers_stored"] == 3 and s["waiting"] == "new prompts")
        assert (idle["rows_total"], idle["rows_left"]) == (3, 0)
        with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"prompt": "What is 71 + 30?"}\n{"prompt": "What is 72 + 30?"}\n')
        write_prompts(tmp_path / "b.jsonl", range(80, 82))
        torn = tmp_path / "c.jsonl"
        torn.write_text('{"prompt": "What is 90 + 30?"}\n{"prompt": "What is 9', encoding="utf-8")
        grown = run.until(lambda s: s["answers_stored"] == 8 and s["complaints"])
        assert "c.jsonl:2" in grown["complaints"][0]
        with torn.open("a", encoding="utf-8") as file:
            file.write('1 + 30?"}\n')
        done = run.until(lambda s: s["answers_stored"] == 9)
        assert (done["rows_total"], done["from_cache"], done["duplicates"]) == (9, 0, 0)
        client.tell(run.store, "stop")
        assert run.end()[0] == 10
    assert mock.totals()["answers"] == 9


@pytest.mark.slow
def test_a_watching_run_may_begin_with_nothing(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 1)
    (tmp_path / "a.jsonl").unlink()
    assert harvester("run", config).returncode == 2
    with running(config, "--watch", "--limit", 4) as run:
        run.until(lambda s: s["waiting"] == "new prompts")
        write_prompts(tmp_path / "d.jsonl", range(10, 30))
        code, out, _ = run.end()
    assert (code, out.partition(":")[0]) == (10, "rows")
    assert mock.totals()["answers"] == 4


def test_without_a_service_manager_nothing_is_sent(tmp_path: Path) -> None:
    ServiceNotifier({}).beat("x")
    ServiceNotifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready()  # a lost message is no error
    assert ServiceNotifier({"WATCHDOG_USEC": "3000000"}).watchdog_s == 3.0
    assert ServiceNotifier({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}).watchdog_s is None

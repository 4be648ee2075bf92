"""Test a harvest inside a program that needs its main thread for itself, as notebooks and services do."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from harvester.mock_teacher.running import RunningMock
from harvester.run import job
from harvester.run.endings import Summary
from harvester.run.prepare import prepare
from tests.journey.run_process import write_folder


def test_a_harvest_runs_in_a_thread_and_leaves_signal_handlers_alone(
    mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 5)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    ended: list[Summary] = []

    def harvest() -> None:
        ended.append(asyncio.run(job.run(prepare(config), lambda _: None)))

    thread = threading.Thread(target=harvest)
    thread.start()
    thread.join(240)
    assert [(summary.exit_code, summary.counts.answers_stored) for summary in ended] == [(0, 5)]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

"""Run the mock teacher while a harvest asks it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from trainer.distil.config import NamedFile
from trainer.errors import ConfigError
from trainer.harvester_process import end_with

# Seconds that the mock teacher may take to start, and to end.
START_S, END_S = 30.0, 10.0


@contextlib.contextmanager
def mock_teacher(harvest: NamedFile, log: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Run `harvester mock-teacher` at the address of harvest.toml during the block.

    If something answers there already, it is asked instead.

    Raises:
        ConfigError: the address is not on this machine, or the mock teacher did not start.
    """
    teacher = harvest.table.get("teacher")
    url = urlsplit(str(teacher.get("base_url", "")) if isinstance(teacher, dict) else "")
    if url.hostname not in {"127.0.0.1", "localhost"} or url.port is None:
        raise ConfigError(
            "mock_teacher = true needs a base_url on this machine",
            place=str(harvest.path),
            remedy='set [teacher] base_url = "http://127.0.0.1:8000/v1", or remove mock_teacher for a real '
            "teacher",
        )
    if _answers(url.port):
        note(f"port {url.port}: a server is there already, so no mock teacher is started")
        yield
        return
    command = [sys.executable, "-m", "harvester", "mock-teacher", "--port", str(url.port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=end_with(os.getpid())
        )
        try:
            _wait_until_it_answers(process, url.port, log)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + START_S
    while not _answers(port):
        if process.poll() is not None or time.monotonic() > ends:
            raise ConfigError(
                "the mock teacher did not start",
                place=str(log),
                remedy="read the log named above; is the port of base_url in use?",
            )
        time.sleep(0.05)  # between two looks at a process that is starting

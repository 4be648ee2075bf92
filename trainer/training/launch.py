"""Run `trainer train` in several processes on this machine, one for each device, and end them together.

The launching process loads no torch: it starts the workers, forwards signals, and watches. A worker that
fails ends all of them. If the launcher itself is killed, the kernel kills its workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from trainer.errors import ConfigError, ProcessLost
from trainer.process import handling

# Seconds that the remaining workers get to checkpoint and end after the first one failed.
GRACE_S = 60.0

# The same after a second signal, which asks for the end without a checkpoint.
SECOND_SIGNAL_GRACE_S = 5.0

# Exit codes of a worker that ended because another did: the connection was lost, or SIGTERM came from here.
FOLLOWING_CODES = frozenset({ProcessLost.exit_code, 128 + signal.SIGTERM})

# Seconds between two looks at the workers.
POLL_S = 0.05

# Linux: number of the prctl option that names the signal a process gets when its parent ends.
PR_SET_PDEATHSIG = 1

# Characters of a worker's stderr that are shown when it fails.
MAX_STDERR = 4000

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Worker:
    """One process of the training; `stderr` holds what it printed, None if that went to the terminal."""

    rank: int
    process: subprocess.Popen[bytes]
    stderr: IO[bytes] | None

    @property
    def code(self) -> int | None:
        """Exit code; minus the signal's number if a signal ended it; None while it runs."""
        return self.process.poll()


def launch(config: Path, processes: int, report: Report, *, flags: Sequence[str] = ()) -> int:
    """Run `trainer train CONFIG` in `processes` processes and wait for them.

    Args:
        report: prints what a worker other than the first said when it failed.
        flags: more options of `trainer train`.

    Returns:
        The exit code; see `run_workers`.

    Raises:
        ConfigError: fewer than two processes.
        ProcessLost: a signal from elsewhere ended a worker.
    """
    if processes < 2:
        raise ConfigError(
            "a launch needs at least two processes",
            place="--processes",
            remedy="leave the option out to train in one process",
        )
    # `--processes 1`: TRAINER_TRAIN_PROCESSES, which the workers inherit, is that of the launcher.
    command = [sys.executable, "-m", "trainer", "train", str(config), "--processes", "1", *flags]
    return run_workers(command, processes, report)


def run_workers(command: Sequence[str], count: int, report: Report) -> int:
    """Run a command in `count` processes with torchrun's environment variables; wait until all have ended.

    SIGTERM and SIGINT are forwarded to every worker, and the workers may finish their step and checkpoint. A
    second signal leaves them `SECOND_SIGNAL_GRACE_S`. When a worker fails the others get SIGTERM and
    `GRACE_S`. No process is left alive.

    Returns:
        0 if all succeeded; 128 + number after a signal; else the exit code of the first rank that failed by
        itself, before one that only lost its connection to another.

    Raises:
        ProcessLost: a signal from elsewhere ended a worker.
    """
    port = _free_port()
    workers: list[Worker] = []
    with _collected_signals() as received:
        try:
            for rank in range(count):
                workers.append(_start(command, rank, count, port))
            _wait(workers, received)
            _kill(workers)
            return _exit_code(workers, received, report)
        finally:
            _kill(workers)
            for worker in workers:
                if worker.stderr is not None:
                    worker.stderr.close()


def _wait(workers: Sequence[Worker], received: Sequence[int]) -> None:
    """Watch the workers until all have ended, or until those left over have used up their time."""
    forwarded = 0
    deadline: float | None = None
    while running := [worker for worker in workers if worker.code is None]:
        now = time.monotonic()
        if len(received) > forwarded:
            _send(running, received[forwarded])
            forwarded += 1
            if forwarded == 2:
                deadline = now + SECOND_SIGNAL_GRACE_S
        if deadline is None and any(worker.code for worker in workers):
            deadline = now + GRACE_S
            if not forwarded:
                _send(running, signal.SIGTERM)
        if deadline is not None and now >= deadline:
            return
        time.sleep(POLL_S)


def _exit_code(workers: Sequence[Worker], received: Sequence[int], report: Report) -> int:
    codes = [worker.process.returncode for worker in workers]
    if not any(codes):
        return 0
    if received:
        return 128 + received[0]
    failed = [worker for worker in workers if worker.process.returncode > 0]
    failed.sort(
        key=lambda worker: worker.process.returncode in FOLLOWING_CODES
    )  # stable: by rank among equals
    killed = [worker for worker in workers if worker.process.returncode < 0]
    if killed and all(worker.process.returncode in FOLLOWING_CODES for worker in failed):
        rank, number = killed[0].rank, -killed[0].process.returncode
        cause = "; the kernel sends it when memory runs out" if number == signal.SIGKILL else ""
        raise ProcessLost(
            f"process {rank} of {len(workers)} was ended by signal {number} "
            f"({signal.Signals(number).name}{cause}); the others were stopped",
            remedy="the same command resumes from the last checkpoint",
        )
    _show_stderr(failed[0], report)
    return int(failed[0].process.returncode)


def _show_stderr(worker: Worker, report: Report) -> None:
    if worker.stderr is None:
        return
    worker.stderr.seek(0)
    text = worker.stderr.read().decode("utf-8", errors="replace")[-MAX_STDERR:]
    for line in text.splitlines():
        report(f"[process {worker.rank}] {line}")


def _start(command: Sequence[str], rank: int, count: int, port: int) -> Worker:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    is_leader = rank == 0
    stderr = None if is_leader else tempfile.TemporaryFile()  # noqa: SIM115 - read after the process ended
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if is_leader else subprocess.DEVNULL,
        stderr=stderr,
        # Ctrl-C reaches the launcher only, which forwards it: a worker takes a second signal as "end now".
        start_new_session=True,
        preexec_fn=_end_with_parent(),
    )
    return Worker(rank, process, stderr)


def _end_with_parent() -> Callable[[], None] | None:
    """Return what a child calls before it runs its command, so that the kernel kills it with its parent."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def set_signal() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:  # the parent ended meanwhile
            os.kill(os.getpid(), signal.SIGKILL)

    return set_signal


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        worker.process.send_signal(number)  # does nothing once the process has ended


def _kill(workers: Sequence[Worker]) -> None:
    for worker in workers:
        if worker.code is None:
            worker.process.kill()
    for worker in workers:
        worker.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """Collect every SIGTERM and SIGINT during the block. As process 1 of a container we get no other way."""
    received: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    with handling(on_signal):
        yield received

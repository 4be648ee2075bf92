"""Run `trainer train` in several processes on this machine, one for each device, and end them together.

The launching process starts the workers, forwards signals, and watches. A worker that fails ends all of them.
If the launcher itself is killed, the kernel kills its workers. With several machines there is a launcher on
each, and `nodes` lets them end together; a launcher of one machine loads no torch.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
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

from harvester.system.free_port import free_port
from trainer.errors import ConfigError, ProcessLost
from trainer.process import ECHO_S, handling
from trainer.training.nodes import Ending, Nodes, RankShare
from trainer.training.rendezvous import Rendezvous, meet, workers_environment

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


def launch(
    config: Path,
    processes: int,
    report: Report,
    *,
    flags: Sequence[str] = (),
    rendezvous: Rendezvous | None = None,
) -> int:
    """Run `trainer train CONFIG` in `processes` processes on this machine and wait for them.

    Args:
        report: prints what a worker other than the first said when it failed.
        flags: more options of `trainer train`.
        rendezvous: of the machines that take part; None: this one alone.

    Returns:
        The exit code; see `run_workers`.

    Raises:
        ConfigError: fewer than two processes.
        ProcessLost: a signal from elsewhere ended a worker; a node is lost, or did not come.
    """
    if rendezvous is None and processes < 2:
        raise ConfigError(
            "a launch needs at least two processes",
            place="--processes",
            remedy="leave the option out to train in one process",
        )
    # Variables of these options, which the workers inherit, are those of the launcher.
    alone = ["--processes", "1", "--nnodes", "1"]
    command = [sys.executable, "-m", "trainer", "train", str(config), *alone, *flags]
    if rendezvous is None:
        return run_workers(command, processes, report)
    report(f"waiting for {rendezvous.nodes} nodes at {rendezvous.endpoint}")
    return run_workers(command, processes, report, Nodes(meet(rendezvous)))


def run_workers(command: Sequence[str], count: int, report: Report, nodes: Nodes | None = None) -> int:
    """Run a command in `count` processes with torchrun's environment variables; wait until all have ended.

    SIGTERM and SIGINT are forwarded to every worker, and the workers may finish their step and checkpoint. A
    second signal leaves them `SECOND_SIGNAL_GRACE_S`. When a worker fails the others get SIGTERM and
    `GRACE_S`; so they do when another node failed. No process is left alive.

    Args:
        nodes: launchers of the other machines; None: there are none.

    Returns:
        0 if all succeeded; 128 + number after a signal; else the exit code of the first rank that failed by
        itself, before one that only lost its connection to another. The same on all nodes.

    Raises:
        ProcessLost: a signal from elsewhere ended a worker, or a node is lost.
    """
    share = RankShare(0, count, count, "127.0.0.1", free_port()) if nodes is None else nodes.share(count)
    if nodes is not None:
        last = share.first + count - 1
        report(f"node {nodes.node} of {nodes.count}: processes {share.first} to {last} of {share.total}")
    workers: list[Worker] = []
    with _collected_signals() as received:
        try:
            for rank in range(count):
                workers.append(_start(command, rank, share))
            _wait(workers, received, nodes)
            _kill(workers)
            ending = _ending(workers, received, share.total, report)
            if nodes is not None:
                return nodes.agree(ending)
            if ending.message:
                raise ProcessLost(ending.message, remedy="the same command resumes from the last checkpoint")
            return ending.code
        finally:
            _kill(workers)
            for worker in workers:
                if worker.stderr is not None:
                    worker.stderr.close()


def _wait(workers: Sequence[Worker], received: Sequence[int], nodes: Nodes | None) -> None:
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
        failed = any(worker.code for worker in workers) or (nodes is not None and nodes.has_failure)
        if deadline is None and failed:
            deadline = now + GRACE_S
            if not forwarded:
                _send(running, signal.SIGTERM)
        if deadline is not None and now >= deadline:
            return
        time.sleep(POLL_S)


def _ending(workers: Sequence[Worker], received: Sequence[int], total: int, report: Report) -> Ending:
    """Return how the workers of this machine ended."""
    codes = [worker.process.returncode for worker in workers]
    if not any(codes):
        return Ending(0)
    if received:
        return Ending(128 + received[0], received=received[0])
    failed = [worker for worker in workers if worker.process.returncode > 0]
    failed.sort(
        key=lambda worker: worker.process.returncode in FOLLOWING_CODES
    )  # stable: by rank among equals
    killed = [worker for worker in workers if worker.process.returncode < 0]
    if killed and all(worker.process.returncode in FOLLOWING_CODES for worker in failed):
        rank, number = killed[0].rank, -killed[0].process.returncode
        cause = "; the kernel sends it when memory runs out" if number == signal.SIGKILL else ""
        return Ending(
            ProcessLost.exit_code,
            message=f"process {rank} of {total} was ended by signal {number} "
            f"({signal.Signals(number).name}{cause}); the others were stopped",
        )
    _show_stderr(failed[0], report)
    code = int(failed[0].process.returncode)
    return Ending(code, by_itself=code not in FOLLOWING_CODES)


def _show_stderr(worker: Worker, report: Report) -> None:
    if worker.stderr is None:
        return
    worker.stderr.seek(0)
    text = worker.stderr.read().decode("utf-8", errors="replace")[-MAX_STDERR:]
    for line in text.splitlines():
        report(f"[process {worker.rank}] {line}")


def _start(command: Sequence[str], local_rank: int, share: RankShare) -> Worker:
    rank = share.first + local_rank
    environment = {
        **workers_environment(os.environ),
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(share.total),
        "LOCAL_WORLD_SIZE": str(share.count),
        "MASTER_ADDR": share.address,
        "MASTER_PORT": str(share.port),
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


@contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT during the block. As process 1 of a container we get no other way.

    A SIGTERM soon after another one is no second wish: Slurm signals the tasks, and srun forwards its own.
    """
    received: list[int] = []
    terminated_at = -math.inf

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal terminated_at
        now = time.monotonic()
        if number == signal.SIGTERM:
            is_echo, terminated_at = now - terminated_at < ECHO_S, now
            if is_echo:
                return
        received.append(number)

    with handling(on_signal):
        yield received

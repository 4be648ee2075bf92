"""Render parts in several processes.

A process that ends, however it ends, is noticed at once. When this one ends, even by SIGKILL, the others read
the end of their pipe and end, too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from harvester.system import failpoints
from trainer.config import TrainConfig
from trainer.data.tokens.unit import Unit, UnitRenderer
from trainer.errors import HarvesterError, ProcessLost


def render(config: TrainConfig, parts: Path, units: Sequence[Unit], processes: int) -> Iterator[Unit]:
    """Render units in several processes; yield each one when its part is on the disk.

    Raises:
        ProcessLost: a process was killed, for memory as a rule.
        HarvesterError, OSError: what rendering a unit raises, with the same message and exit code.
    """
    context = multiprocessing.get_context("spawn")
    left = list(reversed(units))
    busy: dict[Connection, tuple[BaseProcess, Unit]] = {}
    started: list[BaseProcess] = []
    try:
        for _ in range(min(processes, len(units))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs, config, parts), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            unit = left.pop()
            ours.send(unit)
            busy[ours] = (process, unit)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, unit = busy.pop(connection)
                _receive(connection, process)
                yield unit
                if left:
                    following = left.pop()
                    connection.send(following)
                    busy[connection] = (process, following)
                else:
                    connection.close()
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.join()


def _receive(connection: Connection, process: BaseProcess) -> None:
    """Wait for the end of a unit; raise what it raised."""
    try:
        problem = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise ProcessLost(
            f"a process that tokenises the corpus ended (exit code {process.exitcode})",
            remedy="the same command goes on; free some memory if it was killed for that",
        ) from None
    if problem is not None:
        raise problem


def _work(connection: Connection, config: TrainConfig, parts: Path) -> None:
    """Render the units that arrive, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core
    renderer: UnitRenderer | None = None
    while True:
        try:
            unit = connection.recv()
        except (EOFError, ConnectionError):
            return
        problem: Exception | None = None
        try:
            renderer = renderer or UnitRenderer(config, parts)
            renderer.write(unit)
            failpoints.reach("tokens.worker")
        except (HarvesterError, OSError) as error:
            problem = error
        try:
            connection.send(problem)
        except ConnectionError:
            return  # the first process is gone

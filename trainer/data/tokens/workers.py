"""Share work out to several processes.

A process that ends, however it ends, is noticed at once. When this one ends, even by SIGKILL, the others read
the end of their pipe and end, too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from harvester.system import failpoints
from trainer.errors import HarvesterError, ProcessLost

Task = TypeVar("Task")
Result = TypeVar("Result")


def run(
    make: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task], processes: int
) -> Iterator[tuple[Task, Result]]:
    """Do tasks in several processes; yield each one with its result when it is done.

    Args:
        make: called once in each process; returns what does a task. It and the tasks must be picklable: they
            go through pipes to processes of our own.

    Raises:
        ProcessLost: a process was killed, for memory as a rule.
        HarvesterError, OSError: what a task raises, with the same message and exit code.
    """
    context = multiprocessing.get_context("spawn")
    left = list(reversed(tasks))
    busy: dict[Connection, tuple[BaseProcess, Task]] = {}
    started: list[BaseProcess] = []
    try:
        for _ in range(min(processes, len(tasks))):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs, make), daemon=True)
            process.start()
            theirs.close()
            started.append(process)
            task = left.pop()
            ours.send(task)
            busy[ours] = (process, task)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                process, task = busy.pop(connection)
                yield task, _receive(connection, process)
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


def _receive(connection: Connection, process: BaseProcess) -> Any:
    """Wait for the end of a task and return its result; raise what it raised."""
    try:
        problem, result = connection.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise ProcessLost(
            f"a process that tokenises the corpus ended (exit code {process.exitcode})",
            remedy="the same command goes on; free some memory if it was killed for that",
        ) from None
    if problem is not None:
        raise problem
    return result


def _work(connection: Connection, make: Callable[[], Callable[[Any], Any]]) -> None:
    """Do the tasks that arrive, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core
    do: Callable[[Any], Any] | None = None
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionError):
            return
        problem: Exception | None = None
        result = None
        try:
            do = do or make()
            result = do(task)
            failpoints.reach("tokens.worker")
        except (HarvesterError, OSError) as error:
            problem = error
        try:
            connection.send((problem, result))
        except ConnectionError:
            return  # the first process is gone

"""Run the command lines of `harvester` and `trainer`.

Commands of the trainer and mock teachers run in processes that are forked from one that has imported torch
and transformers: that saves 4 s of CPU each. Nothing else differs from `python -m trainer` and
`python -m harvester.mock_teacher`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# What the process that others are forked from imports.
PRELOADED = [
    "harvester.mock_teacher.__main__",
    "harvester.mock_teacher.neural.worker",
    "trainer.cli.main",
    "trainer.training.train",
    "trainer.evaluation.evaluate",
    "trainer.experiments.curve",
    "trainer.experiments.loop",
    "transformers.models.llama.modeling_llama",
    "benchmarks.quality.calibration",
    "benchmarks.quality.held_out",
]


@cache
def _forking() -> ForkServerContext:
    """Start the process that others are forked from, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # One thread each: two trainings side by side are faster than one with two threads.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def harvester(*arguments: object) -> dict[str, Any]:
    """Run `harvester ... --json`; return the JSON of its last line."""
    command = [sys.executable, "-m", "harvester", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def trainer(log: Path, *arguments: object) -> None:
    """Run `trainer ARGUMENTS` in this process, which ends with it; its output goes to the end of a file.

    Raises:
        RuntimeError: the exit code is not 0.
    """
    from trainer.cli.main import main

    log.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = ["trainer", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        if ended.code not in (0, None):
            command = " ".join(sys.argv)
            raise RuntimeError(f"{command!r} ended with exit code {ended.code}; see {log}") from None


@contextmanager
def mock_teacher(*flags: str) -> Iterator[None]:
    """Serve `python -m harvester.mock_teacher FLAGS` during a block.

    Raises:
        RuntimeError: it ended without serving; it has written why to stderr.
    """
    receiver, sender = _forking().Pipe(duplex=False)
    process = _forking().Process(target=_serve, args=(sender, flags), daemon=True)
    process.start()
    sender.close()
    try:
        with open(receiver.fileno(), closefd=False) as output:
            if not output.readline():
                raise RuntimeError(f"the mock teacher did not start: {' '.join(flags)}")
        yield
    finally:
        process.terminate()
        process.join()
        receiver.close()


def _serve(sender: Connection, flags: Sequence[str]) -> None:
    """Serve in this process, which ends with it; its first line goes to a pipe."""
    from harvester.mock_teacher.__main__ import main

    os.dup2(sender.fileno(), 1)
    sender.close()
    sys.exit(main(["--json", *flags]))


class Pool:
    """Run functions in processes of their own, so many at a time."""

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers)
        self._is_stopping = False

    def start(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Start a function when a process is free."""
        return self._threads.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        process = _forking().Process(target=function, args=arguments)
        if not self._is_stopping:
            process.start()
            process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"{function.__name__}{arguments} ended with exit code {process.exitcode}")

    def close(self, *, stops: bool = False) -> None:
        """Wait for what is under way; with `stops` only until it has written a checkpoint."""
        if stops:
            self._is_stopping = True
            self._threads.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
        self._threads.shutdown()


def toml(values: dict[str, dict[str, Any] | Any]) -> str:
    """Return a TOML document of values and tables of values."""
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += [f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value)

"""Run the command lines of `harvester` and `trainer`.

Commands of the trainer run in processes that are forked from one that has imported torch and transformers:
that saves 6 s of CPU each. Nothing else differs from `python -m trainer`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

PRELOADED = [
    "trainer.cli",
    "trainer.training.train",
    "trainer.evaluation.evaluate",
    "trainer.experiments.curve",
    "trainer.experiments.loop",
    "transformers.models.llama.modeling_llama",
    "benchmarks.quality.calibration",
]


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
    from trainer.cli import main

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


class Pool:
    """Run functions in processes of their own, so many at a time."""

    def __init__(self, workers: int) -> None:
        # One thread each: two trainings side by side are faster than one with two threads.
        os.environ["OMP_NUM_THREADS"] = "1"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._threads = ThreadPoolExecutor(workers)
        self._is_stopping = False

    def start(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Start a function when a process is free."""
        return self._threads.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        process = self._context.Process(target=function, args=arguments)
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

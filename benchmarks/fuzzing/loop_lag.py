"""Measure how long large replies block the event loop of a whole harvest.

A run asks for replies of up to the size limit, in all shapes that parsers find hard. A timer on its event
loop measures how late it is called. Late is only what this process computed meanwhile: the CPU time of all
its threads (a thread that holds the interpreter blocks the loop too) bounds each delay, so that other
processes of the machine are no finding. A reply that blocks the loop too long is asked for again, alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harvester.errors import HarvesterError
from harvester.run import job
from harvester.run.prepare import prepare

from .large_replies import Recipe
from .scaling import KEY

# Longest time that the event loop may be blocked.
MOST_LAG_S = 0.25
INTERVAL_S = 0.005
_KEY_VARIABLE = "FUZZ_KEY"
_TOML = """\
[teacher]
base_url = "http://127.0.0.1:{port}/v1"
model = "mock-teacher"
terms = "mock-teacher"
api_key_env = "{key_variable}"
[teacher.limits]
max_concurrency = 2
[prompts]
files = ["p.jsonl"]
[run]
deadline_s = 300
max_attempts = 1
"""


def blocking(recipes: Sequence[Recipe]) -> tuple[float, list[str]]:
    """Ask for replies in one run; return the worst lag in seconds, and a line for each that breaks a rule."""
    worst, why = measure(recipes)
    if worst <= MOST_LAG_S and not why:
        return worst, []
    # Which one was it? Each alone; the least of three tries counts.
    worst, broken = 0.0, []
    for recipe in recipes:
        lag, why = measure([recipe])
        for _ in range(2):
            if lag > MOST_LAG_S:
                again, why = measure([recipe])
                lag = min(lag, again)
        worst = max(worst, lag)
        if lag > MOST_LAG_S:
            broken.append(f"{recipe.text}: the event loop was blocked for {lag:.3f} s")
        if why:
            broken.append(f"{recipe.text}: an exception ended the run: {why}")
    return worst, broken


def measure(recipes: Sequence[Recipe]) -> tuple[float, str]:
    """Return the worst lag of a run that asks for these replies, and the exception that ended it, or ""."""
    with tempfile.TemporaryDirectory(prefix="fuzz-lag-") as folder, _served() as port:
        root = Path(folder)
        lines = [json.dumps({"prompt": recipe.text}) for recipe in recipes]
        (root / "p.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        text = _TOML.format(port=port, key_variable=_KEY_VARIABLE)
        (root / "harvest.toml").write_text(text, encoding="utf-8")
        os.environ[_KEY_VARIABLE] = KEY
        lag = Lag()
        try:
            asyncio.run(_run(root / "harvest.toml", lag))
        except HarvesterError:
            pass  # the teacher is at fault, which is right
        except Exception as error:  # noqa: BLE001 - any other exception is a finding
            return lag.worst_s, f"{type(error).__name__}: {error}"
    return lag.worst_s, ""


class Lag:
    """The longest time that the event loop was blocked by work of this process."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def watch(self) -> None:
        """Call a timer again and again, and measure how late it is."""
        while True:
            began, spent = time.perf_counter(), time.process_time()
            await asyncio.sleep(INTERVAL_S)
            late = time.perf_counter() - began - INTERVAL_S
            self.worst_s = max(self.worst_s, min(late, time.process_time() - spent))


async def _run(path: Path, lag: Lag) -> None:
    prepared = prepare(path)
    watching = asyncio.create_task(lag.watch())
    try:
        await job.run(prepared, lambda _: None)
    finally:
        watching.cancel()


@contextmanager
def _served() -> Iterator[int]:
    """Serve replies from another process; give its port."""
    program = [sys.executable, "-m", f"{__package__}.large_replies"]
    folder = Path(__file__).parents[__package__.count(".") + 1]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=folder) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.terminate()

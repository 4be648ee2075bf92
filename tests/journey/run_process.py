"""Run a harvest as a process of its own and control it as an operator would: signals, socket, commands."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvester.observe.status import read_status
from tests import commands
from tests.waiting import PATIENCE_S

CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
{teacher}
[prompts]
files = ["*.jsonl"]
[sampling]
temperature = 0.0
max_tokens = 64
{more}
"""


def write_folder(root: Path, base_url: str, rows: int, *, teacher: str = "", more: str = "") -> Path:
    write_prompts(root / "a.jsonl", range(10, 10 + rows))
    path = root / "harvest.toml"
    path.write_text(CONFIG.format(base_url=base_url, teacher=teacher, more=more), encoding="utf-8")
    return path


def write_prompts(path: Path, numbers: Sequence[int]) -> None:
    lines = [json.dumps({"prompt": f"What is {number} + 30?"}) + "\n" for number in numbers]
    path.write_text("".join(lines), encoding="utf-8")


def harvester(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    done = commands.run("harvester", arguments, timeout=PATIENCE_S, environment=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done


class RunProcess:
    """One `harvester run` under way."""

    def __init__(self, config: Path, process: commands.Command) -> None:
        self.store = config.parent / "store"
        self.process = process

    def until(
        self, wanted: Callable[[dict[str, Any]], bool], *, within_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The heartbeat, as soon as it says what is wanted."""
        limit = time.monotonic() + within_s
        result: dict[str, Any] = {}
        while time.monotonic() < limit:
            result = read_status(self.store)
            if result and result.get("pid") == self.process.pid and wanted(result):
                return result
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError(f"never said so: {result}")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, *, within_s: float = PATIENCE_S) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=within_s)
        assert "Traceback" not in err, err
        return self.process.wait(), out, err


@contextmanager
def running(
    config: Path, *flags: object, stdout: Any = subprocess.PIPE, **environment: str
) -> Iterator[RunProcess]:
    process = commands.Command("harvester", ["run", config, *flags], stdout=stdout, environment=environment)
    try:
        yield RunProcess(config, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()

"""Run real harvests in forks and kill them: `python -m tests.harvester.harvest_forks harvest.toml [QUIET_S]`.

Reads one line for each run, `SECONDS FAILPOINT` (`-` for none), forks, lets the child harvest, kills it with
SIGKILL that many seconds after its first progress, and answers `STATUS STORED`: the exit status and the last
number of answers that the child had counted as stored. Everything is imported once, so a run has no start-up.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import select
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from harvester.api.http import client  # noqa: F401 - imported before the first fork
from harvester.run import job, prepare
from harvester.store.maintain import seal_task
from harvester.store.shards import seal
from harvester.system import failpoints
from harvester.teacher.limiter import window
from harvester.terms.records import load_registry

pa.array([""])  # the first array looks for pandas
QUIET_S = float(sys.argv[2]) if len(sys.argv) > 2 else 0.02


def live(config: Path, failpoint: str, pipe: int) -> None:
    seal_task.SEAL_EVERY_S, seal_task.QUIET_S = 0.05, QUIET_S
    window.FIRST_WINDOW = 128  # a short life has no time to open its window
    seal.EXPECTED_COMPRESSION = 0  # whatever is there is sealed: many small shards, to be merged
    name, _, nth = failpoint.partition(":")
    failpoints._armed, failpoints._left = name, int(nth or 1)

    def watch(snapshot: Mapping[str, Any]) -> None:
        os.write(pipe, b"%d\n" % snapshot["answers_stored"])

    summary = asyncio.run(job.run(prepare.prepare(config), watch))
    os._exit(summary.exit_code)


def main() -> None:
    config = Path(sys.argv[1])
    if "transport" in config.read_text(encoding="utf-8"):
        # Before the first fork: the SDK, and what its client loads when it is made.
        for module in ("harvester.run.batch.opening", "openai", "httpcore2"):
            importlib.import_module(module)
    load_registry()
    for line in sys.stdin:
        seconds, failpoint = line.split()
        readable, writable = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                live(config, failpoint, writable)
            finally:
                os._exit(99)
        os.close(writable)
        child = os.pidfd_open(pid)
        select.select([readable, child], [], [])  # the first word: it begins to ask
        if not select.select([child], [], [], float(seconds))[0]:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(child)
        with os.fdopen(readable, "rb") as pipe:
            stored = (pipe.read().splitlines() or [b"0"])[-1]
        print(os.waitstatus_to_exitcode(status), int(stored), flush=True)


if __name__ == "__main__":
    main()

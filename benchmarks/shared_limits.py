"""Measure how well several harvests of one machine share a teacher's limit.

    python benchmarks/shared_limits.py [--seconds 20] [--harvests 2 5] [--unknown]

The teacher is the mock teacher in a process: 200 requests/s (or --rate), 0.2 s latency, a burst of one
second's worth. Each harvest is `harvester run` as a process with a folder of its own. Prints the answers per
second over the limit, and the refusals over all requests, of a span that begins when all have had SETTLE_S to
agree; then one is killed with SIGKILL, and the time until the answers of a second are 95 % of the limit
again. With --unknown no harvest is told the limit, nor do headers state it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harvester.mock_teacher.running import RunningMock, start_process

LATENCY_S = 0.2
SETTLE_S = 5.0
USED_GOAL, REFUSED_GOAL, RETURN_GOAL_S = 0.95, 0.01, 5.0


def write_folder(folder: Path, base_url: str, number: int, rows: int, rpm: int | None) -> Path:
    """Write a harvest whose prompts no other has."""
    folder.mkdir()
    with (folder / "p.jsonl").open("w") as file:
        for row in range(rows):
            file.write(json.dumps({"prompt": f"What is {row} + {number}?"}) + "\n")
    path = folder / "harvest.toml"
    limits = "" if rpm is None else f"requests_per_minute = {rpm}\n"
    path.write_text(
        f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        f'[teacher.limits]\n{limits}max_concurrency = 512\n[prompts]\nfiles = ["p.jsonl"]\n'
        "[sampling]\nmax_tokens = 64\n"
    )
    return path


@contextmanager
def harvesting(path: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a harvest until the block ends."""
    command = [sys.executable, "-m", "harvester", "run", str(path)]
    with (path.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def statuses(mock: RunningMock) -> tuple[float, int, int]:
    """Return the time, and the replies 200 and 429 so far."""
    counts = mock.state()["statuses"]
    return time.monotonic(), counts.get("200", 0), counts.get("429", 0)


def wait_for_all(paths: list[Path]) -> None:
    """Wait until every harvest says that it shares with all others."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        states = [path.parent / "store" / "status.json" for path in paths]
        known = [json.loads(state.read_text()) if state.exists() else {} for state in states]
        shared = [status.get("shared") or [{}] for status in known]
        if all(len(leases[0].get("others", ())) == len(paths) - 1 for leases in shared):
            return
        time.sleep(0.1)
    raise TimeoutError("the harvests don't know of each other")


def seconds_until_used(mock: RunningMock, rate: int, limit_s: float) -> float:
    """Return the seconds until the answers of one second are 95 % of the limit; infinity for never."""
    begun = time.monotonic()
    shots = [statuses(mock)]
    while time.monotonic() - begun < limit_s:
        time.sleep(0.1)
        shots.append(statuses(mock))
        before = next((shot for shot in reversed(shots) if shots[-1][0] - shot[0] >= 1.0), None)
        if before is not None and before[0] >= begun + 0.5:
            per_s = (shots[-1][1] - before[1]) / (shots[-1][0] - before[0])
            if per_s >= USED_GOAL * rate:
                return shots[-1][0] - begun
    return float("inf")


def measure(harvests: int, seconds: float, rate: int, *, is_told: bool) -> None:
    """Measure one number of harvests and print it."""
    flags = ["--rpm", str(rate * 60), "--latency", str(LATENCY_S), *([] if is_told else ["--hide-limits"])]
    rows = int(rate * (seconds + 60))
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shared-")))
        mock = stack.enter_context(start_process(*flags))
        environment = {**os.environ, "XDG_STATE_HOME": str(root / "state")}
        paths = [
            write_folder(root / f"h{number}", mock.base_url, number, rows, rate * 60 if is_told else None)
            for number in range(harvests)
        ]
        processes = [stack.enter_context(harvesting(path, environment)) for path in paths]
        wait_for_all(paths)
        time.sleep(SETTLE_S)
        begun, answered, refused = statuses(mock)
        time.sleep(seconds)
        ended, answered_then, refused_then = statuses(mock)
        answers, refusals = answered_then - answered, refused_then - refused
        used = answers / (ended - begun) / rate
        share = refusals / max(1, answers + refusals)
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        back_s = seconds_until_used(mock, rate, 20.0)
    known = "told" if is_told else "unknown"
    print(
        f"{harvests} harvests, limit {rate}/s, {known}: {used:.1%} of the limit used (goal {USED_GOAL:.0%}), "
        f"{share:.2%} refused (goal {REFUSED_GOAL:.0%}), all used again {back_s:.1f} s after a kill "
        f"(goal {RETURN_GOAL_S:.0f} s); load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> None:
    """Measure each number of harvests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--harvests", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--unknown", action="store_true")
    arguments = parser.parse_args()
    for harvests in arguments.harvests:
        measure(harvests, arguments.seconds, arguments.rate, is_told=not arguments.unknown)


if __name__ == "__main__":
    main()

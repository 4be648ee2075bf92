"""Measure the start-up time of `harvester --help`, and of `harvester status` on a store of a million rows.

    python benchmarks/startup.py [--rows 1000000] [--store DIR] [--times 9]

Creates a store in DIR if there is none: unsealed answers in the journal, the slowest case for a reader, and
--dangling attempts without an outcome. Prints median and worst wall time of --times starts of the program.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harvester.api.types import Prompt
from harvester.observe.status import write_status
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Answer, Intent, RunRecord

BATCH = 2000
HELP_S, STATUS_S = 0.25, 0.5
ENDPOINT = "http://127.0.0.1:8000/v1"


def make(store: Path, rows: int, dangling: int) -> None:
    """A store with so many answers, written by the journal's own code."""
    with Journal.open(store) as journal:
        journal.begin_run(RunRecord("run-1", started_at=time.time(), teacher_id=f"{ENDPOINT}|mock"))
        for start in range(0, rows, BATCH):
            journal.apply([_answer(number) for number in range(start, min(start + BATCH, rows))])
        for start in range(0, dangling, BATCH):
            numbers = range(start, min(start + BATCH, dangling))
            journal.apply([Intent(n + 1, _key(-n - 1), "run-1", ENDPOINT, 0.0, 40, 9) for n in numbers])
        journal.end_run("run-1", "complete", 0, time.time())
    write_status(store, {"run_id": "run-1", "state": "complete", "rows_total": rows, "answers_stored": rows})


def _key(number: int) -> bytes:
    return hashlib.sha256(b"row %d" % number).digest()


def _answer(number: int) -> Answer:
    prompt = Prompt(f"p{number}", ({"role": "user", "content": f"What is {number} + 1?"},))
    raw = {"choices": [{"message": {"content": str(number + 1)}, "finish_reason": "stop"}]}
    return Answer(
        attempt_id=number + 1,
        key=_key(number),
        raw=json.dumps(raw).encode(),
        status=200,
        prompt=prompt,
        sample_index=0,
        body={"model": "mock", "messages": list(prompt.messages)},
        outcome="ok",
        input_tokens=12,
        output_tokens=3,
        cost_microusd=9,
        attempts=1,
        latency_s=0.2,
        at=0.0,
        endpoint=ENDPOINT,
    )


def measure(times: int, *arguments: str) -> tuple[float, float, float]:
    """Median and worst wall time of the program with these arguments, and its median CPU time, in seconds."""
    program = str(Path(sys.executable).with_name("harvester"))
    taken, worked = [], []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run([program, *arguments], stdout=subprocess.DEVNULL, check=True)
        taken.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(taken), max(taken), statistics.median(worked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dangling", type=int, default=0)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--times", type=int, default=9)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        store = chosen.store or Path(scratch) / "store"
        if not (store / "journal.db").exists():
            make(store, chosen.rows, chosen.dangling)
        for name, allowed_s, arguments in (
            ("--help", HELP_S, ["--help"]),
            (f"status, {chosen.rows:,} rows", STATUS_S, ["status", str(store)]),
        ):
            median, worst, cpu = measure(chosen.times, *arguments)
            print(
                f"{name:<26} {median:.3f} s, worst {worst:.3f} s, of CPU {cpu:.3f} s (allowed {allowed_s} s)"
            )


if __name__ == "__main__":
    main()

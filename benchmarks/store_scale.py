"""Measure a store of one or ten million rows: open, look up, rerun with all answers stored, memory.

    python benchmarks/store_scale.py [--rows 1000000] [--folder DIR]

Makes two stores (`store_maker`), of a tenth of the rows and of all, so that growth can be seen; measures each
in a fresh process. `open`: lock, journal, corpus and its count. `look-up`: 10,000 keys, half of them held.
`warm`: all keys in order through the writer thread, 500 at a time, as a pass looks them up. `full` and
`rerun`: `harvester run` over the whole prompt file from the command's start to its last word, nothing sent;
the full pass reads every row, looks it up, and merges small shards, the rerun is the next one, which finds
the file as it was (`finished`). Memory is the process's highest resident set: over the first three, and of
each of the other two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
CHUNK = 500
LOOKED_UP = 10_000
TARGETS = {
    "open_s": 1.0,
    "lookup_s": 0.5,
    "memory_mib": 300,
    "warm_per_s": 100_000,
    "full_memory_mib": 300,
    "rerun_per_s": 100_000,
    "rerun_memory_mib": 300,
}


def measure(folder: Path, rows: int) -> dict[str, float]:
    """All but the rerun, in this process."""
    from benchmarks.store_maker import keys_of
    from harvester.config.config import load
    from harvester.store.journal.group_commit import GroupCommit
    from harvester.store.journal.journal import Journal
    from harvester.store.journal.lock import StoreLock
    from harvester.store.reader import Corpus

    config, store = load(folder / "harvest.toml"), folder / "store"
    begun = time.perf_counter()
    with StoreLock(store, started_at=time.time()):
        writer = GroupCommit(Journal.open(store))
        assert Corpus.open(store).count() == rows
        opened = time.perf_counter() - begun
        rng = random.Random(1)
        keys = [rng.randbytes(32) for _ in range(LOOKED_UP // 2)]
        keys += [keys_of(config, range(n, n + 1))[0] for n in rng.sample(range(rows), LOOKED_UP // 2)]
        rng.shuffle(keys)
        begun = time.perf_counter()
        result, lookup_cpu = writer.call(lambda journal: counted(lambda: journal.look_up(keys))).result()
        looked_up = time.perf_counter() - begun
        assert len(result) == LOOKED_UP // 2
        warm_s = warm_cpu = 0.0
        for begin in range(0, rows, CHUNK):
            chunk = keys_of(config, range(begin, min(begin + CHUNK, rows)))
            begun = time.perf_counter()
            held, cpu = writer.call(lambda j, keys=chunk: counted(lambda: j.look_up(keys))).result()
            warm_s += time.perf_counter() - begun
            warm_cpu += cpu
            assert len(held) == len(chunk)
        memory = most_memory_mib()
        writer.close()
    return {
        "open_s": opened,
        "lookup_s": looked_up,
        "lookup_cpu_s": lookup_cpu,
        "warm_per_s": rows / warm_s,
        "warm_per_cpu_s": rows / warm_cpu,
        "memory_mib": memory,
    }


def counted(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the CPU seconds of this thread: on a busy machine the wall clock tells of others."""
    begun = time.thread_time()
    return work(), time.thread_time() - begun


def most_memory_mib() -> float:
    """Highest resident set of this process. Not getrusage's: that remembers whom it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(folder: Path, rows: int, name: str) -> dict[str, float]:
    """`harvester run` with everything held, in a process of its own."""
    command = [sys.executable, "-m", "harvester", "run", str(folder / "harvest.toml"), "--json"]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begun
    stdout = json.loads(done.stdout)
    assert (stdout["requests_sent"], stdout["from_cache"]) == (0, rows)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {f"{name}_per_s": rows / seconds, f"{name}_memory_mib": memory}


def full(folder: Path, rows: int) -> dict[str, float]:
    """A pass over files that the store knows nothing of."""
    journal = folder / "store" / "journal.db"
    with contextlib.closing(sqlite3.connect(journal)) as connection, connection:
        connection.execute("DROP TABLE IF EXISTS finished")
    return run(folder, rows, "full")


def rerun(folder: Path, rows: int) -> dict[str, float]:
    """The pass after it."""
    return run(folder, rows, "rerun")


def size_mib(folder: Path) -> dict[str, float]:
    """Bytes on disk."""
    shards = sum(path.stat().st_size for path in (folder / "store" / "shards").iterdir())
    return {
        "shards_mib": shards / 2**20,
        "journal_mib": (folder / "store" / "journal.db").stat().st_size / 2**20,
    }


def in_process(folder: Path, rows: int, what: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.store_scale", "--measure", what]
    command += ["--rows", str(rows), "--folder", str(folder)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the stores here; default: a folder that goes")
    parser.add_argument("--measure", choices=["store", "full", "rerun"], help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.measure:
        measures = {"store": measure, "full": full, "rerun": rerun}
        print(json.dumps(measures[wanted.measure](wanted.folder, wanted.rows)))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.store_maker import make

    with contextlib.ExitStack() as stack:
        place = wanted.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for rows in (wanted.rows // 10, wanted.rows):
            folder = place / f"rows-{rows}"
            if not (folder / "store" / "journal.db").exists():
                begun = time.perf_counter()
                make(folder, rows)
                print(f"made {rows:,} rows in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
            figures = {
                **size_mib(folder),
                **in_process(folder, rows, "store"),
                **in_process(folder, rows, "full"),
                **in_process(folder, rows, "rerun"),
            }
            text = ", ".join(
                f"{name} {value:,.3g}" if value < 1000 else f"{name} {value:,.0f}"
                for name, value in figures.items()
            )
            print(f"{rows:>12,} rows: {text}")
    print("asked: " + ", ".join(f"{name} {value:,}" for name, value in TARGETS.items()))


if __name__ == "__main__":
    main()

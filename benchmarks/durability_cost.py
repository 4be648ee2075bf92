"""Measure the CPU that storing an answer costs the writer thread, compared with a bare SQLite insert.

    python benchmarks/durability_cost.py [--seconds 10] [--rate 1000]

Answers arrive evenly at the rate, each with its intent before it, and are committed as in a harvest. The bare
insert puts the same bytes (key and body) into a table of two columns, WAL and synchronous=FULL, in
transactions as large as the writer's were, every intent as a row of its own. CPU is user and system time of
the one thread (`CLOCK_THREAD_CPUTIME_ID`), per answer.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sqlite3
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from harvester.api.types import Prompt
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Answer, Intent, Record, RunRecord

ENDPOINT = "http://127.0.0.1:8000/v1"
TARGET_US = 60


def records_of(number: int) -> tuple[Intent, Answer]:
    """An attempt and its answer: 1.1 KB of body, as chat completions are."""
    key = hashlib.sha256(b"%d" % number).digest()
    text = f"{number} and so on, " * 40
    message = {"role": "user", "content": f"What is {number} + {7 * number}?"}
    raw = json.dumps(
        {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "model": "mock-teacher",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 30, "completion_tokens": 250, "total_tokens": 280},
        }
    ).encode()
    prompt = Prompt(f"p{number}", (message,), file="prompts.jsonl", line=number + 1)
    body = {"messages": [message], "model": "mock-teacher", "max_tokens": 512}
    return Intent(number + 1, key, "run", ENDPOINT, 1.79e9, 542, 300), Answer(
        number + 1, key, raw, 200, prompt, 0, body, "ok", 30, 250, 155, 1, 0.8, 1.79e9, ENDPOINT
    )


def through_the_writer(
    store: Path, pairs: list[tuple[Intent, Answer]], rate: float
) -> tuple[float, list[int]]:
    """CPU seconds of the writer thread, and how many records each transaction held."""
    journal = Journal.open(store)
    journal.begin_run(RunRecord("run", 1.79e9, "teacher"))
    sizes: list[int] = []
    apply = journal.apply

    def counted(records: list[Record]) -> None:
        sizes.append(len(records))
        apply(records)

    journal.apply = counted  # type: ignore[method-assign, assignment]
    writer = GroupCommit(journal)
    left, ended = len(pairs), threading.Event()

    def stored(error: BaseException | None) -> None:
        nonlocal left
        assert error is None
        left -= 1
        if left == 0:
            ended.set()

    before = writer.call(lambda _: time.thread_time()).result()
    begun = time.perf_counter()
    for number, (intent, answer) in enumerate(pairs):
        late = begun + number / rate - time.perf_counter()
        if late > 0:
            time.sleep(late)
        writer.submit(intent, lambda error, answer=answer: writer.submit(answer, stored))
    ended.wait()
    cpu = writer.call(lambda _: time.thread_time()).result() - before
    writer.close()
    return cpu, sizes


def bare(path: Path, pairs: list[tuple[Intent, Answer]], sizes: list[int]) -> float:
    """CPU seconds of SQLite alone for the same bytes in transactions of these sizes."""
    rows: list[tuple[bytes, bytes]] = []
    for intent, answer in pairs:
        rows += [(intent.key, b""), (answer.key, answer.raw)]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("CREATE TABLE kept (key BLOB, raw BLOB)")
        begin, before = 0, time.thread_time()
        for size in sizes:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT INTO kept VALUES (?, ?)", rows[begin : begin + size])
            connection.execute("COMMIT")
            begin += size
        return time.thread_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1000.0)
    wanted = parser.parse_args()
    pairs = [records_of(number) for number in range(int(wanted.seconds * wanted.rate))]
    with tempfile.TemporaryDirectory() as name:
        cpu, sizes = through_the_writer(Path(name) / "store", pairs, wanted.rate)
        alone = bare(Path(name) / "bare.db", pairs, sizes)
    text: dict[str, Any] = {
        "answers": len(pairs),
        "transactions": len(sizes),
        "writer_us": round(cpu / len(pairs) * 1e6, 1),
        "bare_us": round(alone / len(pairs) * 1e6, 1),
        "ratio": round(cpu / alone, 2),
        "asked_us": TARGET_US,
    }
    print(json.dumps(text))


if __name__ == "__main__":
    main()

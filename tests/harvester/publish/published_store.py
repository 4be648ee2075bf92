"""Make small stores to publish, and commands to publish them with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harvester.api.request_key import request_key
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import SharedAnswer
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.store.shards.seal import seal
from tests.commands import run
from tests.harvester.store_rows import ENDPOINT, answer, body_of, intent, open_store, prompt_of, raw_of

MODEL = "mock-teacher"


def body(number: int) -> dict[str, Any]:
    """Return the body of a request; its model is one that the terms of the mock teacher cover."""
    return {**body_of(number), "model": MODEL}


def key(number: int) -> bytes:
    """Return the key of a row."""
    return request_key(ENDPOINT, body(number), 0)


def make_store(folder: Path, numbers: range, *, shards: int = 1, **changes: Any) -> Path:
    """Return a store with so many rows in so many shards."""
    with open_run(folder, **changes) as journal:
        size = -(-len(numbers) // shards)
        for start in range(0, len(numbers), size):
            add_rows(journal, numbers[start : start + size], changes.get("run_id", "run-1"))
            seal(journal, folder, target_bytes=1 << 30, everything=True)
    return folder


def open_run(store: Path, **changes: Any) -> Journal:
    """Open a store and begin a run."""
    return open_store(store, **{"model": MODEL, "teacher_id": f"{ENDPOINT}|{MODEL}", **changes})


def add_rows(journal: Journal, numbers: range, run_id: str = "run-1") -> None:
    """Add rows, which are not sealed yet."""
    pairs = list(enumerate(numbers, start=journal.next_attempt_id()))
    journal.apply([replace(intent(number, run_id, attempt), key=key(number)) for attempt, number in pairs])
    journal.apply(
        [
            answer(
                number,
                attempt_id=attempt,
                key=key(number),
                body=body(number),
                raw=raw_of(number).replace(b"mock-2026", MODEL.encode()),
            )
            for attempt, number in pairs
        ]
    )


def share(store: Path, number: int, prompt_id: str) -> None:
    """Let another prompt share the answer of a row."""
    with Journal.open(store) as journal:
        prompt = prompt_of(number, id=prompt_id, metadata={"task": "other"})
        journal.apply([SharedAnswer(key(number), prompt, 0)])


def grow(store: Path, numbers: range) -> None:
    """Add rows to a store, in one more shard."""
    with open_run(store, run_id="run-2") as journal:
        add_rows(journal, numbers, "run-2")
        seal(journal, store, target_bytes=1 << 30, everything=True)


def rows(store: Path) -> list[Sample]:
    """Return all samples in a fixed order."""
    return sorted(Corpus.open(store).samples(), key=lambda sample: (sample.key, sample.prompt_id))


def publish(
    store: Path, url: str, *options: str, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    """Run `harvester publish`; return its result and how it ended."""
    done = run("harvester", ["publish", store, url, "--json", *options], environment=environment)
    return json.loads(done.stdout) if done.stdout.strip() else {}, done

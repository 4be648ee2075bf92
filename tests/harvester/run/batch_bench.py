"""Run harvests in batches against a mock teacher whose batch clock a test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from harvester.mock_teacher.running import RunningMock
from harvester.run.control import client
from harvester.store.journal.batches import WaitingBatches, waiting_in_batches
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.store.verify import verify_journal
from tests.faults.bench import Ended, run_harvest

HOUR = 3600.0
# USD per million tokens: in batches half.
PRICE = {"input": 2.0, "output": 4.0, "batch_input": 1.0, "batch_output": 2.0}
# Seconds of the test's clock, which is 25 times as fast as the machine's.
QUICK = {"poll": 0.25, "poll_max": 0.5, "settle": 0.1}


def sums(count: int) -> list[str]:
    return [f"What is {n} + {7 * n}?" for n in range(count)]


def harvest(
    mock: RunningMock,
    root: Path,
    prompts: Sequence[str | Mapping[str, Any]],
    faults: Sequence[Mapping[str, Any]] = (),
    *,
    transport: str = "batch",
    batch: Mapping[str, Any] | None = None,
    api: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Ended:
    """Run one harvest; every prompt may be billed once and no more, whatever the faults are."""
    teacher = {"price": PRICE, "limits": {"max_concurrency": 8}, **parts.pop("teacher", {})}
    if api is not None:
        teacher["batch"] = api
    return run_harvest(
        mock,
        root,
        faults,
        prompts=prompts,
        teacher=teacher,
        run={"transport": transport, "patience_s": 600, **(run or {})},
        batch={**QUICK, **(batch or {})},
        **parts,
    )


def stop_when_waiting(root: Path, **arguments: Any) -> Callable[[Mapping[str, Any]], None]:
    """Return a watch that asks the run to stop, as an operator does, once it waits for a batch."""
    asked: list[threading.Thread] = []

    def watch(status: Mapping[str, Any]) -> None:
        if "batch" in status["waiting"] and not asked:
            ask = partial(client.ask, root / "store", "stop", **arguments)
            asked.append(threading.Thread(target=ask, daemon=True))
            asked[0].start()

    return watch


def waiting(store: Path) -> WaitingBatches:
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        return waiting_in_batches(connection)


def batches(store: Path) -> list[tuple[str, str]]:
    """State and the provider's last word of every batch, in order."""
    with closing(Journal.open(store, read_only=True)) as journal, journal.reading() as connection:
        return connection.execute("SELECT state, status FROM batches ORDER BY batch").fetchall()


def require_whole(store: Path, mock: RunningMock, rows: int, *, billed: int | None = None) -> None:
    """Every row is answered once, no body was billed twice, and the journal is whole."""
    totals = mock.totals()
    assert (totals["requests"], totals["bodies"]) == (rows if billed is None else billed, rows)
    samples = list(Corpus.open(store).samples(("key", "prompt_id", "outcome")))
    assert len({sample.key for sample in samples}) == len(samples) == rows
    assert verify_journal(store) == []
    assert waiting(store).rows == 0

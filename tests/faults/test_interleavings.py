"""Test faults between event loop and writer thread: cancellations anywhere, interrupts, a stalled loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.errors import StoreError
from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Intent, Record
from harvester.store.journal.writer import AsyncWriter
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]


class Desk:
    """Stands for the writer: holds records until told to acknowledge one, with or without an error."""

    def __init__(self) -> None:
        self.held: list[Callable[[BaseException | None], None]] = []

    def submit(self, _: Record, done: Callable[[BaseException | None], None]) -> None:
        self.held.append(done)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hand over", "await", "cancel", "commit", "fail", "yield"]), st.integers(0, 9)
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_row_67_every_acknowledgement_is_heard_exactly_once(steps: list[tuple[str, int]]) -> None:
    asyncio.run(_interleave(steps))


async def _interleave(steps: list[tuple[str, int]]) -> None:
    desk, faults = Desk(), []
    scribe = AsyncWriter(desk, faults.append)  # type: ignore[arg-type]
    heard: list[int] = []
    waiters: list[asyncio.Task[None]] = []
    acknowledged = failed = 0
    for step, which in steps:
        if step == "hand over":
            number = len(heard)
            heard.append(0)
            scribe.submit(_intent(number), lambda number=number: _count(heard, number))  # type: ignore[misc]
        elif step == "await":
            waiters.append(asyncio.create_task(scribe.write_durably(_intent(which))))
            await asyncio.sleep(0)
        elif step == "cancel" and waiters:
            waiters[which % len(waiters)].cancel()
        elif step in {"commit", "fail"} and desk.held:
            error = KeyboardInterrupt() if step == "fail" else None
            failed += step == "fail"
            acknowledged += 1
            desk.held.pop(0)(error)
        elif step == "yield":
            await asyncio.sleep(0)
    while desk.held:
        desk.held.pop(0)(None)
    await asyncio.wait_for(scribe.flush(), 240)  # nothing is owed: the count came back to zero
    ended = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(entry is None or isinstance(entry, StoreError | asyncio.CancelledError) for entry in ended)
    assert all(times <= 1 for times in heard)
    assert len(faults) == (failed > 0)
    assert (scribe.fault is not None) == (failed > 0)


def _count(heard: list[int], number: int) -> None:
    heard[number] += 1


def _intent(number: int) -> Intent:
    return Intent(number, b"k" * 32, "run", "http://127.0.0.1:1/v1", 0.0)


def test_row_67_an_interrupt_inside_the_writer_is_heard_and_ends_the_run_with_5(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = mock_teacher()
    real, fired = Journal.apply, []

    def struck(self: Journal, records: Any) -> None:
        if not fired and any(type(record).__name__ == "Answer" for record in records):
            fired.append(True)
            raise KeyboardInterrupt
        real(self, records)

    monkeypatch.setattr(Journal, "apply", struck)
    ended = run_harvest(mock, tmp_path)
    assert fired
    assert ended.exit_code == 5, ended.output
    assert "can't write the journal" in ended.output
    again = run_harvest(mock, tmp_path)
    assert (again.exit_code, again.totals.answers) == (0, 3)
    lost = mock.totals()["requests"] - 3
    assert lost <= again.totals.possibly_billed


def test_row_67_a_cancelled_pass_resolves_every_waiter(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "store")
    writer = GroupCommit(journal)

    async def go() -> list[Any]:
        scribe = AsyncWriter(writer, lambda _: None)
        tasks = [asyncio.create_task(scribe.write_durably(_intent(n))) for n in range(1, 200)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await scribe.flush()
        return ended

    try:
        ended = asyncio.run(go())
    finally:
        writer.close()
    assert sum(entry is None for entry in ended) >= 99
    with Journal.open(tmp_path / "store", read_only=True) as journal:
        assert journal.next_attempt_id() == 200  # all were written, whoever still listened


def test_row_66_a_stalled_loop_is_seen_and_loses_nothing(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.01)
    stalled: list[bool] = []

    def watch(status: Mapping[str, Any]) -> None:
        if status["answers_stored"] > 3 and not stalled:
            stalled.append(True)
            time.sleep(0.3)  # the fault: something computes on the event loop

    ended = run_harvest(mock, tmp_path, prompts=[f"What is {n} + 5?" for n in range(60)], watch=watch)
    assert stalled
    assert (ended.exit_code, ended.totals.answers, ended.billed["requests"]) == (0, 60, 60)
    points = [json.loads(line) for line in (tmp_path / "store" / "trace.jsonl").read_text().splitlines()]
    assert max(point["loop_lag_s"] for point in points) >= 0.2


def test_row_66_sealing_and_compacting_leave_the_loop_to_others(mock_teacher: Mock, tmp_path: Path) -> None:
    """They run on the writer's thread, a slice at a time."""
    mock = mock_teacher()
    threads: set[str] = set()
    real = Journal.writing

    def seen(self: Journal) -> Any:
        threads.add(threading.current_thread().name)
        return real(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Journal, "writing", seen)
        ended = run_harvest(mock, tmp_path)
    assert ended.exit_code == 0
    assert list((tmp_path / "store" / "shards").glob("*.parquet"))
    assert threads == {"journal-writer"}

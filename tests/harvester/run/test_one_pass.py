"""Test a whole pass over real sockets: complete, billed once, resumable, with the documented ending."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harvester.api.request_builder import requests
from harvester.api.types import Prompt
from harvester.config.config import HarvestConfig
from harvester.errors import PromptError, TeacherRefused
from harvester.mock_teacher.running import RunningMock
from harvester.observe.counters import PassLimits, PassResult, Snapshot
from harvester.run.one_pass import CHUNK, make_pass
from harvester.run.pass_parts import PassSetup
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import RunRecord
from tests.harvester.store_rows import without_outcome

Mock = Callable[..., RunningMock]


def config(mock: RunningMock, **parts: Any) -> HarvestConfig:
    teacher = {"base_url": mock.base_url, "model": "mock-teacher", **parts.pop("teacher", {})}
    sampling = parts.pop("sampling", {"max_tokens": 64})
    return HarvestConfig.model_validate(
        {"teacher": teacher, "prompts": {"files": ["p"]}, "sampling": sampling, **parts}
    )


def sums(count: int) -> list[Prompt]:
    return [prompt(f"p{n}", f"What is {n} + {7 * n}?") for n in range(count)]


def prompt(identity: str, text: str) -> Prompt:
    return Prompt(identity, ({"role": "user", "content": text},), reference="r", metadata={"task": "sum"})


class Bench:
    """A store, and passes over it."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.snapshots: list[Snapshot] = []
        self.runs = 0

    def run(
        self,
        chosen: HarvestConfig,
        prompts: Iterable[Prompt],
        *,
        limits: PassLimits | None = None,
        stop_when: Callable[[Snapshot], bool] = lambda _: False,
    ) -> PassResult:
        async def go(writer: GroupCommit) -> PassResult:
            stop = asyncio.Event()

            def note(seen: Snapshot) -> None:
                self.snapshots.append(seen)
                if stop_when(seen):
                    stop.set()

            setup = PassSetup(
                config=chosen,
                key=None,
                writer=writer,
                run_id=run_id,
                limits=limits or PassLimits(grace_s=10),
                stop=stop,
            )
            return await make_pass(requests(prompts, chosen), setup, on_progress=note)

        self.runs += 1
        run_id = f"run-{self.runs}"
        journal = Journal.open(self.store)
        writer = GroupCommit(journal)
        try:
            record = RunRecord(run_id, started_at=0.0, teacher_id=chosen.teacher.teacher_id)
            writer.call(lambda j: j.begin_run(record)).result()
            return asyncio.run(go(writer))
        finally:
            writer.close()

    def totals(self) -> Any:
        with Journal.open(self.store, read_only=True) as journal:
            return journal.totals()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


ROWS = 1000


def test_a_thousand_prompts_arrive_complete_billed_once_and_never_again(
    mock_teacher: Mock, bench: Bench
) -> None:
    mock = mock_teacher()
    chosen = config(mock)
    first = bench.run(chosen, sums(ROWS))
    assert first.ending == "complete"
    assert first.counts.answers_stored == first.counts.requests_sent == ROWS
    ledger = mock.totals()
    assert (ledger["requests"], ledger["bodies"], ledger["cut"]) == (ROWS, ROWS, 0)
    assert first.counts.output_tokens == ledger["completion_tokens"]
    assert first.counts.input_tokens == ledger["prompt_tokens"]
    again = bench.run(chosen, sums(ROWS))
    assert again.counts.requests_sent == 0
    assert again.counts.from_cache == ROWS
    assert mock.totals()["requests"] == ROWS
    assert bench.totals().answers == ROWS


def test_equal_requests_are_one_flight(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(latency_s=0.05)
    twins = [prompt(f"twin{n}", f"What is {n % 10} + 1?") for n in range(1200)]
    result = bench.run(config(mock), twins)
    assert mock.totals()["requests"] == result.counts.answers_stored == 10
    assert result.counts.duplicates + result.counts.from_cache == 1190


def test_samples_of_one_prompt_are_asked_one_by_one(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher()
    result = bench.run(config(mock, sampling={"samples": 3, "seed": 5, "max_tokens": 9}), sums(4))
    assert result.counts.answers_stored == mock.totals()["requests"] == 12


def test_transient_faults_are_retried_and_all_rows_arrive(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(
        faults=[
            {"action": "status", "status": 500, "nth": 3},
            {"action": "status", "status": 503, "nth": 5},
            {"action": "reset", "nth": 8},
        ]
    )
    result = bench.run(config(mock), sums(30))
    assert sum(mock.fired().values()) == 3
    assert result.counts.answers_stored == 30
    assert result.counts.dead == 0
    assert result.counts.retries == 3


def test_rate_limits_cost_no_attempt(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(rpm=240, burst_s=1.0)  # four at once, of the twelve that are sent first
    result = bench.run(config(mock, run={"max_attempts": 1}), sums(12))
    assert result.counts.rate_limited > 0
    assert (result.counts.answers_stored, result.counts.dead) == (12, 0)


def test_a_known_limit_is_never_overstepped(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(rpm=3000)
    result = bench.run(config(mock, teacher={"limits": {"requests_per_minute": 3000}}), sums(80))
    assert (result.counts.answers_stored, result.counts.rate_limited) == (80, 0)


def test_a_rejected_prompt_is_a_dead_letter_and_never_asked_again(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(faults=[{"action": "status", "status": 400, "nth": 2}])
    result = bench.run(config(mock), sums(10))
    assert (result.counts.answers_stored, result.counts.dead) == (9, 1)
    again = bench.run(config(mock), sums(10))
    assert (again.counts.requests_sent, again.counts.dead, again.counts.from_cache) == (0, 1, 9)


def test_a_refusal_stops_the_pass_and_keeps_what_was_paid(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(faults=[{"action": "status", "status": 401, "nth": 50}], latency_s=0.01)
    with pytest.raises(TeacherRefused):
        bench.run(config(mock, teacher={"limits": {"max_concurrency": 4}}), sums(400))
    billed = mock.totals()["requests"]
    assert billed < 400
    assert bench.totals().answers == billed


def test_a_stop_drains_the_wire_and_the_next_run_finishes(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(latency_s=0.01)
    chosen = config(mock, teacher={"limits": {"max_concurrency": 8}})
    stopped = bench.run(chosen, sums(400), stop_when=lambda seen: seen.answers_stored > 0)
    assert stopped.ending == "interrupted"
    assert 0 < stopped.counts.answers_stored < 400
    assert mock.totals()["requests"] == stopped.counts.answers_stored
    finished = bench.run(chosen, sums(400))
    assert finished.counts.from_cache == stopped.counts.answers_stored
    assert mock.totals()["requests"] == mock.totals()["bodies"] == 400


def test_after_the_grace_the_wire_is_cut_and_counted_as_possibly_billed(
    mock_teacher: Mock, bench: Bench
) -> None:
    mock = mock_teacher(latency_s=30)
    chosen = config(mock, teacher={"limits": {"max_concurrency": 4}})
    result = bench.run(
        chosen, sums(50), limits=PassLimits(grace_s=0.1), stop_when=lambda seen: seen.in_flight == 4
    )
    assert result.ending == "interrupted"
    assert result.counts.possibly_billed == 4
    with Journal.open(bench.store, read_only=True) as journal:
        assert len(without_outcome(journal)) == 4


def test_a_pass_that_drains_by_itself_says_what_it_awaits_and_a_stop_gives_that_its_grace(
    mock_teacher: Mock, bench: Bench
) -> None:
    faults = [{"action": "silence", "nth": 1}, {"action": "status", "status": 401, "nth": 5}]
    mock = mock_teacher(faults=faults, latency_s=0.05)
    chosen = config(mock, teacher={"limits": {"max_concurrency": 4}})
    with pytest.raises(TeacherRefused):
        bench.run(
            chosen,
            sums(50),
            limits=PassLimits(grace_s=0.1),
            stop_when=lambda seen: seen.in_flight == 1 and "paid for" in seen.waiting,
        )
    last = bench.snapshots[-1]
    assert (last.possibly_billed, last.in_flight, last.waiting) == (1, 0, "")


def test_row_limit_and_token_budget_end_the_pass(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher()
    rows = bench.run(config(mock), sums(100), limits=PassLimits(rows=10))
    assert (rows.ending, rows.counts.requests_sent) == ("rows", 10)
    spent = mock.totals()["total_tokens"]
    tokens = bench.run(config(mock), sums(100), limits=PassLimits(tokens=900))
    assert tokens.ending == "budget"
    assert 0 < mock.totals()["total_tokens"] - spent <= 900


def test_the_time_limit_ends_the_pass(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher(latency_s=0.05)
    chosen = config(mock, teacher={"limits": {"max_concurrency": 2}})
    result = bench.run(chosen, sums(2000), limits=PassLimits(runtime_s=0.3, grace_s=10))
    assert result.ending == "runtime"
    assert mock.totals()["requests"] == result.counts.answers_stored < 2000


def test_a_wait_beyond_the_calendar_parks_on_its_last_day(mock_teacher: Mock, bench: Bench) -> None:
    chosen = config(mock_teacher(), teacher={"limits": {"requests_per_day": 1e-9}})
    parked = bench.run(chosen, sums(3))
    assert (parked.ending, parked.counts.answers_stored) == ("parked", 1)
    assert "go on after 9999-12-31" in parked.detail


def test_a_broken_prompt_line_ends_the_pass_after_its_predecessors(mock_teacher: Mock, bench: Bench) -> None:
    def feed() -> Iterable[Prompt]:
        yield from sums(600)
        raise PromptError("broken", place="p.jsonl:601")

    mock = mock_teacher()
    with pytest.raises(PromptError, match=r"p\.jsonl:601"):
        bench.run(config(mock), feed())
    assert bench.totals().answers == mock.totals()["requests"]


def test_an_unused_address_fails_before_any_send(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher()
    chosen = config(mock, run={"patience_s": 0.1})
    mock.stop()
    parked = bench.run(chosen, sums(5))
    assert (parked.ending, bench.totals().attempts) == ("parked", 0)
    assert "can't connect" in parked.detail


def test_progress_adds_up_at_the_end(mock_teacher: Mock, bench: Bench) -> None:
    mock = mock_teacher()
    result = bench.run(config(mock), sums(20))
    last = bench.snapshots[-1]
    assert last == result.counts
    assert last.rows == last.answers_stored + last.from_cache + last.duplicates + last.dead == 20
    assert last.in_flight == 0
    assert Counter(last.outcomes) == {"ok": 20}
    assert sum(last.latency_counts) == 20


def test_a_pass_reads_a_bounded_way_ahead_with_a_window_of_tasks(mock_teacher: Mock, bench: Bench) -> None:
    chosen = config(mock_teacher(), teacher={"limits": {"max_concurrency": 8}})
    read = 0

    def counted() -> Iterator[Prompt]:
        nonlocal read
        for request in sums(1000):
            read += 1
            yield request

    seen: list[tuple[int, int]] = []

    def look(shot: Snapshot) -> bool:
        seen.append((len(asyncio.all_tasks()), read - shot.answers_stored))
        return False

    assert bench.run(chosen, counted(), stop_when=look).counts.answers_stored == 1000
    assert len(seen) > 2
    assert max(tasks for tasks, _ in seen) <= 3 * 8 + 10  # never a task a row
    assert max(ahead for _, ahead in seen) <= CHUNK + 256  # a chunk, and what is not yet durable

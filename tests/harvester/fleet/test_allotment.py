"""A pass whose limits and budget are allocated: real harvests against a mock teacher, with a allocator."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.config.overrides import Overrides
from harvester.errors import Ending, HarvesterError
from harvester.fleet.allocator import Allocator
from harvester.mock_teacher.running import RunningMock
from harvester.run import job, prepare
from harvester.run.endings import Summary
from tests.harvester.run.test_shards import write

Mock = Callable[..., RunningMock]


class Coordinator:
    """The allocator of some ranks, in this process; messages pass through JSON as they do in a cluster."""

    def __init__(self, windows: dict[str, int], budgets: dict[str, Any], ranks: int) -> None:
        self.allocator = Allocator(windows, budgets, ranks, time.monotonic())
        self.lock = threading.Lock()
        self.is_reachable = True
        self.answers: list[dict[str, Any]] = []
        self.reserved: list[int] = []

    def register(self, rank: int, spent: dict[str, Any] | None = None) -> Callable[[Any], Any]:
        ends: dict[str, float | None] = {"run": None}
        with self.lock:
            number = self.allocator.register(
                rank, spent or {}, ends, is_same_store=True, now=time.monotonic()
            )

        def exchange(report: Any) -> Any:
            if not self.is_reachable:
                raise HarvesterError("out of reach")
            with self.lock:
                sent = json.loads(json.dumps({**report, "run_id": f"r{rank}"}))
                answer = self.allocator.exchange(rank, number, sent, time.monotonic())
                assert answer is not None
                self.answers.append(answer)
                self.reserved.append(report["reserved"][0])
            return json.loads(json.dumps(answer))

        return exchange


async def ranks_of(
    path: Path, coordinator: Coordinator, of: int, watch: Callable[[Any], None] = lambda _: None
) -> list[Summary]:
    prepared = [prepare.prepare(path, Overrides(shard=f"{n + 1}/{of}", is_allocated=True)) for n in range(of)]
    exchanges = [coordinator.register(n) for n in range(of)]
    runs = (job.run(p, watch, exchange=e) for p, e in zip(prepared, exchanges, strict=True))
    return list(await asyncio.gather(*runs))


@pytest.mark.slow
def test_ranks_share_one_budget_and_use_it_up(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    path = write(tmp_path, mock, 200, "[sampling]\nmax_tokens = 64\n[budget]\ntokens = 900\n")
    coordinator = Coordinator({mock.base_url: 512}, {"run": (900, None)}, 2)
    summaries = asyncio.run(ranks_of(path, coordinator, 2))
    assert [summary.ending for summary in summaries] == [Ending.BUDGET] * 2
    spent = mock.totals()["total_tokens"]
    # A request reserves 187 tokens, for its prompt is counted in bytes: less than that may be left.
    assert 900 - 187 < spent <= 900
    assert all(summary.counts.answers_stored for summary in summaries)


@pytest.mark.slow
def test_ranks_share_rate_and_places(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(rpm=6000, latency_s=0.05)
    limits = "[teacher.limits]\nrequests_per_minute = 6000\nmax_concurrency = 12\n"
    path = write(tmp_path, mock, 250, limits)
    coordinator = Coordinator({mock.base_url: 12}, {}, 2)
    began = time.monotonic()
    summaries = asyncio.run(ranks_of(path, coordinator, 2))
    assert [summary.ending for summary in summaries] == [Ending.COMPLETE] * 2
    state = mock.state()
    assert state["most_in_flight"] <= 12
    assert state["statuses"].get("429", 0) <= 2
    assert time.monotonic() - began >= 250 / 100 - 1.5
    assert all(sum(a["windows"].values()) <= 12 for a in coordinator.answers)


@pytest.mark.slow
def test_a_pass_that_hears_nothing_sends_nothing(
    mock_teacher: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harvester.run.allotment.FENCE_S", 0.6)
    mock = mock_teacher(latency_s=0.02)
    path = write(tmp_path, mock, 100, "[teacher.limits]\nrequests_per_minute = 3000\n")
    coordinator = Coordinator({mock.base_url: 512}, {}, 1)
    held: list[int] = []

    def watch(status: Any) -> None:
        if status["answers_stored"] >= 20 and not held:
            coordinator.is_reachable = False
        # A busy machine may be late with a message that arrives.
        is_cut_off = held or not coordinator.is_reachable
        if is_cut_off and "no word from the fleet" in status["waiting"] and not status["in_flight"]:
            held.append(mock.state()["admitted"])
            if len(held) == 5:
                coordinator.is_reachable = True

    summaries = asyncio.run(ranks_of(path, coordinator, 1, watch))
    assert summaries[0].ending == Ending.COMPLETE
    assert len(held) >= 5, "the pass was never held"
    assert len(set(held[:5])) == 1, "requests were sent while it was held"
    assert mock.totals()["answers"] == 100


def test_an_answer_beyond_its_reservation_raises_no_ceiling(mock_teacher: Mock, tmp_path: Path) -> None:
    """All that is in flight reserves as much from then on, together more than was allocated."""
    usual = {"prompt_tokens": 20, "completion_tokens": 130}
    faults = [
        {"action": "usage", "value": {"prompt_tokens": 20, "completion_tokens": 3980}, "nth": 1},
        # In flight when the next ceilings are set, which is twice a second; then many end between two times.
        {"action": "usage", "value": usual, "nth": list(range(2, 41)), "delay_s": 1.0},
        {"action": "usage", "value": usual, "delay_s": 0.02},
    ]
    mock = mock_teacher(faults=faults)
    path = write(tmp_path, mock, 300, "[sampling]\nmax_tokens = 64\n[budget]\ntokens = 9000\n")
    coordinator = Coordinator({mock.base_url: 40}, {"run": (9_000, None)}, 1)
    summaries = asyncio.run(ranks_of(path, coordinator, 1))
    assert summaries[0].ending == Ending.BUDGET
    assert max(coordinator.reserved) > 9_000, "too little was in flight"
    spent = coordinator.allocator.budgets()["run"]["tokens_spent"]
    assert spent is not None
    assert 4000 < spent <= 9_000

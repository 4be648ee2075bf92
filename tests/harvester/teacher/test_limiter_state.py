"""A restart does not reset limits: bucket levels, pauses and learned rates are restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher.running import RunningMock
from harvester.observe.counters import PassLimits
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
from harvester.teacher.limiter.bucket import Bucket
from tests.faults.bench import Hasty, run_harvest
from tests.harvester.run.test_one_pass import Bench, config, sums

Mock = Callable[..., RunningMock]
# An answer after the deadline counts as possibly billed and its reservation is not given back, so that fewer
# requests are sent. On a busy machine five seconds may pass.
PATIENT = {"patience_s": 60, "deadline_s": 600}
MANY = tuple(f"What is {n} + {3 * n}?" for n in range(60))


class Later(Hasty):
    """A fast clock whose wall time is `ahead_s` seconds ahead."""

    def __init__(self, ahead_s: float) -> None:
        super().__init__()
        self._ahead_s = ahead_s

    def wall(self) -> float:
        return super().wall() + self._ahead_s


@pytest.mark.slow
def test_row_13_a_parked_run_stays_parked_until_the_reset(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": 429, "headers": {"retry-after": "18000"}, "after": 5}
    parked = run_harvest(mock, tmp_path, [fault], prompts=MANY)
    assert (parked.exit_code, parked.fired > 0) == (10, True)
    assert "go on after" in parked.output
    early = run_harvest(mock, tmp_path, prompts=MANY, clock=Later(3600))
    assert (early.exit_code, early.billed["requests"]) == (10, 0)
    assert "the teacher's Retry-After, 14" in early.output
    resumed = run_harvest(mock, tmp_path, prompts=MANY, clock=Later(18_001))
    assert (resumed.exit_code, resumed.totals.answers) == (0, 60)


def test_changed_limits_cancel_a_saved_pause(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    fault = {"action": "status", "status": 429, "headers": {"retry-after": "18000"}, "first": 9}
    assert run_harvest(mock, tmp_path, [fault], prompts=MANY).exit_code == 10
    raised = run_harvest(
        mock, tmp_path, prompts=MANY, teacher={"limits": {"requests_per_minute": 10_000_000}}
    )
    assert (raised.exit_code, raised.totals.answers) == (0, 60)


@pytest.mark.parametrize("limit", [{"requests_per_day": 24}, {"tokens_per_day": 288}])
def test_a_daily_limit_holds_over_restarts(
    mock_teacher: Mock, tmp_path: Path, limit: dict[str, float]
) -> None:
    mock = mock_teacher()
    for _ in range(4):  # half of the daily limit may be spent at once
        ended = run_harvest(mock, tmp_path, prompts=MANY, teacher={"limits": limit}, run=PATIENT)
        assert (ended.exit_code, "per day" in ended.output) == (10, True), (ended.output, _)
    assert 11 <= mock.totals()["requests"] <= 14
    run_harvest(mock, tmp_path, prompts=MANY, clock=Later(43_200), teacher={"limits": limit}, run=PATIENT)
    assert 17 <= mock.totals()["requests"] <= 21


def test_repeated_crashes_do_not_raise_the_rate(mock_teacher: Mock, tmp_path: Path) -> None:
    """With no saved state at all, the attempts in the journal are charged."""
    mock, bench = mock_teacher(), Bench(tmp_path / "store")
    chosen = config(mock, teacher={"limits": {"requests_per_minute": 6}}, run={"patience_s": 1})
    bench.run(chosen, sums(9), limits=PassLimits(runtime_s=5, grace_s=1))
    assert mock.totals()["requests"] == 1
    for _ in range(3):
        with (
            Journal.open(tmp_path / "store") as journal,
            journal.writing() as connection,
            updating_checksum(connection, "meta"),
        ):
            connection.execute("DELETE FROM meta WHERE name LIKE 'levels:%'")
        bench.run(chosen, sums(9), limits=PassLimits(runtime_s=5, grace_s=1))
    assert mock.totals()["requests"] == 1


@given(st.lists(st.floats(0, 30), min_size=1, max_size=20), st.floats(0.1, 50))
def test_a_saved_level_never_exceeds_what_the_bucket_would_hold(gaps: list[float], rate: float) -> None:
    """A bucket restored in several processes admits no more than one that was never restarted."""
    complete, level, at = Bucket(rate, 0.0), 1.0, 0.0
    sent_whole = sent_split = 0
    for gap in gaps:
        then, at = at, at + gap
        restored = Bucket(rate, at)
        restored.level = min(restored.level, level + (at - then) * rate)
        for bucket, is_split in ((complete, False), (restored, True)):
            while bucket.wait_s(1, at) == 0:
                bucket.take(1)
                sent_split += is_split
                sent_whole += not is_split
        level = restored.level
    assert sent_split <= sent_whole + 1

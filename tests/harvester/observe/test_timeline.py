"""Test the timeline: points during a run, thinning of long files, torn lines."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

from harvester.observe.process_stats import ProcessStats
from harvester.observe.timeline import LAST_EVERY_S, MOST_LINES, TimelineWriter, read_timeline
from harvester.store import paths
from harvester.system.clock import SystemClock
from tests.faults import bench


def test_a_run_leaves_its_trace(tmp_path: Path, mock_teacher):
    ended = bench.run_harvest(
        mock_teacher(latency_s=0.01), tmp_path, prompts=[f"What is {n} + 1?" for n in range(30)]
    )
    points = read_timeline(ended.store)
    assert points
    last = points[-1]
    assert (last["sent"], last["stored"], last["in_flight"]) == (30, 30, 0)
    assert last["rss_bytes"] > 2**20
    assert last["open_files"] > 3
    assert [point["at"] for point in points] == sorted(point["at"] for point in points)


def test_refusals_and_their_reason_are_in_the_trace(tmp_path: Path, mock_teacher):
    # All are refused at first: a refusal among answers would delay its own row only.
    faults = [{"action": "status", "status": 429, "first": 12, "retry_after": 2}]
    mock = mock_teacher()
    prompts = [f"What is {n} + 2?" for n in range(12)]
    ended = bench.run_harvest(
        mock, tmp_path, faults, prompts=prompts, clock=SystemClock(), teacher={"limits": {}}
    )
    assert ended.fired == 12
    points = read_timeline(ended.store)
    assert points[-1]["limited"] == 12
    assert points[-1]["errors"] == {"rate_limited": 12}
    assert any("refused" in point["waiting"] for point in points)


def test_points_grow_rarer_with_age(tmp_path: Path):
    now = [0.0]
    trace = TimelineWriter(tmp_path, "r", clock=lambda: now[0])
    while now[0] < 7 * 86_400:
        if trace.is_due():
            trace.note({"requests_sent": int(now[0])}, {})
        now[0] += 15.0
    points = read_timeline(tmp_path)
    assert 86_400 / LAST_EVERY_S < len(points) < MOST_LINES * 1.1


def test_a_long_trace_is_thinned_and_a_torn_line_dropped(tmp_path: Path):
    path = tmp_path / paths.TIMELINE
    lines = [json.dumps({"at": n, "sent": n}) for n in range(MOST_LINES + 2)]
    path.write_text("\n".join([*lines, '{"at": 99']), encoding="utf-8")
    assert len(read_timeline(tmp_path)) == MOST_LINES + 2
    trace = TimelineWriter(tmp_path, "r")
    trace.note({"requests_sent": 7}, {})
    points = read_timeline(tmp_path)
    assert len(points) == MOST_LINES // 2 + 2
    assert [points[0]["at"], points[1]["at"]] == [0, 2]
    assert points[-1]["sent"] == 7


def test_a_disk_that_refuses_the_trace_ends_nothing(tmp_path: Path):
    trace = TimelineWriter(tmp_path / "gone", "r")
    trace.note({}, {})
    assert read_timeline(tmp_path / "gone") == []


def test_a_blocked_loop_is_seen():
    async def block() -> float:
        vitals = ProcessStats()
        watching = asyncio.create_task(vitals.watch())
        await asyncio.sleep(0)
        time.sleep(0.3)  # what must never happen on the loop
        await asyncio.sleep(0.01)
        lag = vitals.read()["loop_lag_s"]
        vitals.start_over()
        assert vitals.read()["loop_lag_s"] == 0
        watching.cancel()
        return float(lag)

    assert asyncio.run(block()) > 0.2

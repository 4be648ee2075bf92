"""Test what is shown of any status.json, and what a health check makes of an odd one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from harvester.observe import progress, status
from harvester.observe.report import prometheus, report
from harvester.observe.status_line import status_line
from harvester.observe.status_schema import StatusFile, validated_status
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import Totals
from tests.harvester import store_rows

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400)
MEMBERS = st.sampled_from(
    [
        "low",
        "likely",
        "high",
        "requests_per_minute",
        "tokens_per_minute",
        "microusd",
        "microusd_spent",
        "tokens",
        "said",
        "changes",
        "rounds",
        "missed",
        "at",
        "cost_microusd",
    ]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(MEMBERS, inner, max_size=4),
    max_leaves=6,
)
WHOLE: dict[str, Any] = {
    "run_id": "r",
    "state": "running",
    "rows_total": 50,
    "answers_stored": 20,
    "updated_at": 0.0,
    "started_at": 0.0,
    "eta_s": {"low": 60.0, "likely": 90.0, "high": 120.0},
    "tokens_left": {"low": 1, "likely": 2, "high": 3},
    "rates": {"requests_per_minute": 9.0},
    "done_at": {"low": 1.8e9, "likely": 1.8e9, "high": None},
    "closes_at": 1.8e9,
    "finish_by": 1.9e9,
    "limits": {"requests_per_minute": 60.0},
    "budget": {"microusd": 9},
}
NO_STATUS = ("[1]", "{", '"x"', "[" * 5000, '{"run_id": 1, "errors": [1]}', '{"updated_at": "x"}')


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("odd") / "store"
    with store_rows.open_store(store) as journal:
        store_rows.fill(journal, range(5))
    return store


@pytest.fixture(scope="module")
def account(store: Path) -> report.ReportData:
    return report.gather(store)


_NO_SUMS = {"microusd": 9, "microusd_spent": None, "tokens": None, "tokens_spent": None}


@settings(max_examples=40, deadline=None)
@example(odd={"budget": _NO_SUMS, "budgets": {"day": _NO_SUMS}, "cost_microusd": None})
@example(odd={"budget": {"tokens": 9, "tokens_spent": None}, "cost_microusd": None})
@given(odd=st.dictionaries(st.sampled_from(sorted(StatusFile.model_fields)), VALUES, max_size=6))
def test_an_odd_status_breaks_no_reader(store: Path, account: report.ReportData, odd: Mapping[str, Any]):
    (store / "status.json").write_text(json.dumps({**WHOLE, **odd}), encoding="utf-8")
    current = status.current_status(store)
    assert status.status_lines(current)
    assert isinstance(status.unhealthy_reason(current, 600), str)
    assert prometheus.metrics_text(store)
    assert status_line(current, 10)
    assert progress.render("a", current, 1.0)
    assert report.overview(replace(account, status=current))
    json.dumps(current)


@pytest.mark.parametrize(
    "text", ["[1]", "{", '"x"', "[" * 5000, '{"run_id": 1, "errors": [1]}', '{"updated_at": "x"}']
)
def test_what_is_no_status_is_none(store: Path, text: str):
    (store / "status.json").write_text(text, encoding="utf-8")
    assert status.read_status(store) == {}
    first, *_ = status.status_lines(status.current_status(store))
    assert ("is no JSON" in first) != (first == "no run has written a status here yet")
    assert ("is no JSON" in first) == (not text.startswith("{") or text == "{")


def test_what_a_job_says_passes_whole():
    assert validated_status(WHOLE) == WHOLE


def test_hours_are_shown_with_dates(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        lines = status.status_lines(WHOLE)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "done      Fri 2027-01-15 09:00 CET to more than a year from now" in lines
    assert "hours     close Fri 2027-01-15 09:00 CET, deadline Sun 2030-03-17 18:46 CET" in lines


@pytest.fixture
def stopped(store: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the store and is stopped by SIGSTOP."""
    code = (
        "import sys, time, pathlib; from harvester.store.journal.lock import StoreLock\n"
        "with StoreLock(pathlib.Path(sys.argv[1]), started_at=time.time()):\n"
        "    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_stopped_job_is_unfit_however_fresh_its_heartbeat(store: Path, stopped: subprocess.Popen[bytes]):
    (store / "status.json").write_text(json.dumps({**WHOLE, "updated_at": time.time()}), encoding="utf-8")
    assert not status.can_answer(store)
    assert "the run hangs (stopped)" in status.unhealthy_reason(status.current_status(store), 600)


def test_a_heartbeat_from_before_the_clock_was_set_back_is_no_life_sign(store: Path):
    (store / "status.json").write_text(
        json.dumps({**WHOLE, "updated_at": time.time() + 3600}), encoding="utf-8"
    )
    with StoreLock(store, started_at=time.time()):
        assert status.can_answer(store)
        current = status.current_status(store)
        assert current["state"] == "hung"
        assert "3600 s ahead of this clock" in status.unhealthy_reason(current, 600)
        fresh = status.current_status(store, {"updated_at": time.time()})  # it answered
        assert (fresh["state"], status.unhealthy_reason(fresh, 600)) == ("running", "")


def test_a_process_that_has_just_started_is_not_hung_for_the_heartbeat_of_another(store: Path) -> None:
    old = {**WHOLE, "updated_at": time.time() - 3600}
    (store / "status.json").write_text(json.dumps({**old, "pid": os.getpid() + 1}), encoding="utf-8")
    with StoreLock(store, started_at=time.time()):
        current = status.current_status(store)
        assert (current["state"], status.unhealthy_reason(current, 600)) == ("running", "")
        (store / "status.json").write_text(json.dumps({**old, "pid": os.getpid()}), encoding="utf-8")
        assert status.current_status(store)["state"] == "hung"
    with StoreLock(store, started_at=time.time() - 3600):  # it has written none since
        assert status.current_status(store)["state"] == "hung"


def test_what_was_learned_about_the_server_is_shown() -> None:
    heartbeat = {"run_id": "r", "state": "complete", "learned": ["the server works on 8 at once"]}
    assert "learned   the server works on 8 at once" in status.status_lines(heartbeat)


@pytest.mark.parametrize(
    ("lost", "shown"), [(0, {"empty answers": "2"}), (4, {"at most unusable answers": "2"})]
)
def test_the_report_names_no_outcome_of_answers_some_of_which_are_lost(
    account: report.ReportData, lost: int, shown: Mapping[str, str]
) -> None:
    totals = Totals(answers=10, lost=lost, outcomes={"ok": 8, "empty": 2})
    tiles = report._tiles(replace(account, totals=totals))
    bad = ("empty", "unusable")
    assert {tile["name"]: tile["value"] for tile in tiles if any(b in tile["name"] for b in bad)} == shown

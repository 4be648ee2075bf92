"""Batches in `status`, `verify`, `report` and `stop`, and a signal while a run waits for them."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from harvester.mock_teacher.settings import BatchSettings
from harvester.observe.report.report import write_report
from harvester.store.maintain.verify_report import verify_with_bill
from tests.harvester.run.batch_bench import (
    HOUR,
    batches,
    harvest,
    require_whole,
    stop_when_waiting,
    sums,
    waiting,
)
from tests.journey.run_process import harvester, running

ROWS = 8


@pytest.fixture
def waiting_store(mock_teacher, tmp_path: Path):
    """A store whose rows wait in a batch that takes twenty hours."""
    mock = mock_teacher(batches=BatchSettings(latency_s=20 * HOUR))
    ended = harvest(mock, tmp_path, sums(ROWS), watch=stop_when_waiting(tmp_path))
    assert ended.exit_code == 10
    assert "8 rows in 1 batch," in ended.output
    return mock, tmp_path


def test_status_verify_and_report_say_how_many_how_old_and_what_they_may_cost(waiting_store):
    _mock, root = waiting_store
    store = root / "store"
    status = harvester("status", store, "--json")
    held = json.loads(status.stdout)["batches"]
    assert (held["batches"], held["rows"], held["open"][0]["status"]) == (1, ROWS, "in_progress")
    assert held["reserved_microusd"] == waiting(store).reserved_microusd > 0
    [line] = [line for line in harvester("status", store).stdout.splitlines() if line.startswith("batches")]
    assert re.search(r"1 with 8 rows, the oldest \d+ seconds old \(1 in_progress\)", line)
    verified = harvester("verify", store, "--json")
    facts = json.loads(verified.stdout)
    assert (verified.returncode, facts["batches"]["rows"], facts["possibly_billed"]) == (0, ROWS, [])
    assert "8 rows wait (in_progress)" in harvester("verify", store).stdout
    planned = harvester("plan", root / "harvest.toml", "--json")
    outlook = json.loads(planned.stdout)
    assert (outlook["rows"], outlook["in_batches"], outlook["requests"]) == (ROWS, ROWS, 0)
    assert "8 wait in batches, 0 to send" in harvester("plan", root / "harvest.toml").stdout
    page = write_report(store, root / "report.html").read_text(encoding="utf-8")
    assert "rows in batches" in page
    assert "age of the oldest batch" in page


def test_verify_names_rows_whose_batch_is_unknown_or_over(waiting_store):
    _, root = waiting_store
    with closing(sqlite3.connect(root / "store" / "journal.db")) as connection, connection:
        connection.execute("DELETE FROM batches")
    found = verify_with_bill(root / "store", repair=False)
    assert any("a batch that is not known" in message for message in found.messages)
    repaired = verify_with_bill(root / "store", repair=True)
    assert (repaired.messages, waiting(root / "store").rows) == ([], 0)
    assert any("8 rows" in note for note in repaired.repaired.notes)


def test_a_signal_while_it_waits_ends_the_run_at_once_and_the_next_goes_on(waiting_store):
    mock, root = waiting_store
    with running(root / "harvest.toml") as run:
        run.until(lambda status: "batch" in status.get("waiting", ""))
        run.signal(signal.SIGTERM)
        assert run.end()[0] == 143
    assert batches(root / "store") == [("created", "in_progress")]
    mock.advance(20 * HOUR)
    assert harvest(mock, root, sums(ROWS)).exit_code == 0
    require_whole(root / "store", mock, ROWS)
    assert mock.batches()["served"]["create"] == 1


@pytest.mark.parametrize("is_running", [True, False])
def test_stop_can_cancel_the_batches_with_and_without_a_run(waiting_store, is_running):
    """What they have answered by then is kept; the rest is asked again."""
    mock, root = waiting_store
    mock.advance(10 * HOUR)
    if is_running:
        with running(root / "harvest.toml") as run:
            run.until(lambda status: "batch" in status.get("waiting", ""))
            assert harvester("stop", root / "store", "--cancel-batches").returncode == 0
            assert run.end()[0] == 10
    else:
        stopped = harvester("stop", root / "store", "--cancel-batches")
        assert stopped.returncode == 0
        assert "cancelled" in stopped.stdout
    [batch] = mock.batches()["batches"]
    assert batch["status"] == "cancelled"
    assert 0 < batch["request_counts"]["completed"] < ROWS
    last = harvest(mock, root, sums(ROWS), transport="online")
    assert last.exit_code == 0
    require_whole(root / "store", mock, ROWS)
    nothing = harvester("stop", root / "store", "--cancel-batches")
    assert (nothing.returncode, nothing.stdout) == (0, "no batch waits: nothing to cancel\n")

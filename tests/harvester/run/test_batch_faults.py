"""Let the provider's batches go wrong, over real sockets: rows are answered once, or the failure is named."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.mock_teacher.settings import BatchSettings
from harvester.run.batch import submission
from harvester.run.batch.transport import BatchTransport
from harvester.run.control import client
from harvester.store import pauses
from harvester.store.journal.journal import Journal
from tests.harvester.run.batch_bench import (
    HOUR,
    batches,
    harvest,
    require_whole,
    stop_when_waiting,
    sums,
    waiting,
)
from tests.waiting import PATIENCE_S

ROWS = 10


def complaints(store: Path) -> str:
    from harvester.observe.status import read_status

    return "\n".join(read_status(store)["complaints"])


@pytest.mark.parametrize(
    "settings",
    [
        BatchSettings(validating_s=30 * HOUR, window_s=90 * HOUR, tick_s=6 * HOUR),
        BatchSettings(latency_s=20 * HOUR, tick_s=2 * HOUR, shuffle=True),
        BatchSettings(latency_s=HOUR, tick_s=HOUR, duplicate_every=2),
        BatchSettings(max_enqueued=4),
    ],
    ids=["slow validating", "lines out of order", "duplicate custom ids", "queue too small"],
)
def test_what_only_takes_longer_or_repeats_changes_nothing(mock_teacher, tmp_path: Path, settings):
    mock = mock_teacher(batches=settings)
    ended = harvest(mock, tmp_path, sums(ROWS), run={"max_attempts": 5})
    assert (ended.exit_code, ended.totals.paid_twice) == (0, 0)
    require_whole(ended.store, mock, ROWS)


def test_batches_that_the_account_can_not_queue_yet_wait_for_those_before_them(mock_teacher, tmp_path: Path):
    """Batches fail their validation while others are worked on, and are sent again after them."""
    settings = BatchSettings(max_enqueued=7, latency_s=5 * HOUR, tick_s=HOUR / 2, shuffle=True)
    mock = mock_teacher(batches=settings)
    ended = harvest(mock, tmp_path, sums(20), run={"max_attempts": 9})
    assert (ended.exit_code, ended.totals.paid_twice) == (0, 0)
    require_whole(ended.store, mock, 20)
    assert ("ended", "failed") in batches(ended.store)


def test_an_account_that_queues_no_batch_at_all_parks_the_run_and_uses_up_no_attempt(
    mock_teacher, tmp_path: Path
):
    mock = mock_teacher(batches=BatchSettings(fails_with="token_limit_exceeded"))
    ended = harvest(mock, tmp_path, sums(4), run={"max_attempts": 2})
    assert (ended.exit_code, ended.letters, ended.billed["requests"]) == (10, [], 0)
    assert "queues no batch now" in ended.output
    mock.set_batches(fails_with="")
    assert harvest(mock, tmp_path, sums(4), run={"max_attempts": 2}).exit_code == 0
    require_whole(ended.store, mock, 4)


def test_rows_of_which_results_are_deleted_every_time_are_paid_twice_at_most(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(results_kept_s=0, latency_s=HOUR, tick_s=HOUR))
    ended = harvest(mock, tmp_path, sums(4), run={"max_attempts": 5})
    assert [letter["code"] for letter in ended.letters] == ["results_deleted"] * 4
    assert ended.billed["requests"] <= 2 * 4


@pytest.mark.parametrize("transport", ["batch", "hybrid"])
def test_the_answers_of_an_expired_batch_are_kept_and_the_rest_goes_on(
    mock_teacher, tmp_path: Path, transport
):
    """Half of the lines are worked on before the window ends; the error file names the others."""
    mock = mock_teacher(batches=BatchSettings(latency_s=48 * HOUR))

    def watch(status):
        if "with 10 rows" in status["waiting"]:
            mock.advance(24 * HOUR)
            mock.batches()  # it expires now
            mock.set_batches(latency_s=0)

    ended = harvest(mock, tmp_path, sums(ROWS), transport=transport, watch=watch)
    assert ended.exit_code == 0
    require_whole(ended.store, mock, ROWS)
    assert batches(ended.store)[0] == ("ended", "expired")
    assert mock.batches()["batches"][0]["request_counts"]["completed"] == ROWS // 2
    assert (mock.batches()["served"]["create"] > 1) == (transport == "batch")
    assert ended.totals.errors["unavailable"] >= ROWS // 2


@pytest.mark.parametrize(
    ("status", "code", "dead", "counted"),
    [
        (500, "", 0, "unavailable"),
        (429, "", 0, "rate_limited"),
        (400, "content_filter", 2, "prompt_rejected"),
    ],
)
def test_the_lines_of_an_error_file_are_judged_like_replies(
    mock_teacher, tmp_path: Path, status, code, dead, counted
):
    """Every fifth line of the first batch fails; what may succeed later goes into the next batch."""
    mock = mock_teacher(batches=BatchSettings(error_every=5, error_status=status, error_code=code))
    ended = harvest(mock, tmp_path, sums(ROWS), run={"max_attempts": 5, "max_failed": 2})
    assert ended.exit_code == 0
    assert [letter["code"] for letter in ended.letters] == ["prompt_rejected"] * dead
    assert ended.totals.errors == {counted: 2}
    assert ended.billed["requests"] == ended.billed["bodies"] == ROWS - dead
    assert ended.totals.attempts == ROWS + (2 if not dead else 0)


def test_a_batch_that_answers_nothing_ends_the_run_as_single_refusals_do(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(error_every=1, error_status=404, error_code="model_not_found"))
    ended = harvest(mock, tmp_path, sums(ROWS))
    assert (ended.exit_code, ended.letters, ended.billed["requests"]) == (4, [], 0)
    mock.set_batches(error_every=0)
    assert harvest(mock, tmp_path, sums(ROWS)).exit_code == 0
    require_whole(ended.store, mock, ROWS)


@pytest.mark.parametrize("transport", ["batch", "hybrid"])
def test_a_batch_that_fails_its_validation_is_named_or_asked_online(mock_teacher, tmp_path: Path, transport):
    mock = mock_teacher(batches=BatchSettings(fails_with="invalid_json_line"))
    ended = harvest(mock, tmp_path, sums(ROWS), transport=transport)
    assert ended.exit_code == (4 if transport == "batch" else 0)
    if transport == "batch":
        assert "invalid_json_line" in ended.output
        mock.set_batches(fails_with="")
        assert harvest(mock, tmp_path, sums(ROWS)).exit_code == 0
    require_whole(ended.store, mock, ROWS)


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "status", "status": 429, "on": "create", "first": 2, "retry_after": 1},
        {"action": "status", "status": 503, "on": "upload", "first": 2},
        {"action": "fin", "on": "create", "nth": 1},
        {"action": "reset", "on": "upload", "nth": 1},
        {"action": "status", "status": 500, "on": "create", "nth": 1},
        {"action": "status", "status": 500, "on": "retrieve", "first": 3},
        {"action": "status", "status": 429, "on": "content", "nth": 1, "retry_after": 1},
        {"action": "cut_body", "share": 0.5, "on": "content", "nth": 1},
        {"action": "fin", "on": "list", "nth": 1},
    ],
    ids=lambda fault: f"{fault['on']} {fault['action']} {fault.get('status', '')}",
)
def test_a_call_that_fails_is_repeated_and_never_creates_a_second_batch(mock_teacher, tmp_path: Path, fault):
    """Also where the reply to the creation is lost: the batch is found in the provider's list."""
    faults = [fault]
    if fault["on"] == "list":  # nobody reads the list unless a creation was not confirmed
        faults.append({"action": "fin", "on": "create", "nth": 1})
    mock = mock_teacher(batches=BatchSettings(latency_s=HOUR, tick_s=HOUR / 4))
    ended = harvest(mock, tmp_path, sums(ROWS), faults)
    assert (ended.exit_code, ended.fired >= 1) == (0, True)
    require_whole(ended.store, mock, ROWS)
    assert len(mock.batches()["batches"]) == 1


def test_a_creation_that_was_never_carried_out_is_made_again(mock_teacher, tmp_path: Path):
    """The provider fails, and its list does not show the batch: nothing is paid, so its rows go out again."""
    mock = mock_teacher()
    faults = [{"action": "status", "status": 502, "on": "create", "nth": 1}]
    ended = harvest(mock, tmp_path, sums(ROWS), faults)
    assert (ended.exit_code, ended.fired) == (0, 1)
    require_whole(ended.store, mock, ROWS)
    assert [state for state, _ in batches(ended.store)] == ["ended", "ended"]


@pytest.mark.parametrize("retry", [True, False])
def test_a_batch_whose_results_were_deleted_is_named_and_its_rows_are_open(
    mock_teacher, tmp_path: Path, retry
):
    mock = mock_teacher(batches=BatchSettings(latency_s=HOUR, results_kept_s=HOUR))
    harvest(mock, tmp_path, sums(ROWS), watch=stop_when_waiting(tmp_path))
    mock.advance(HOUR)
    mock.batches()  # it ends now
    mock.advance(2 * HOUR)
    mock.set_batches(latency_s=0)
    run = {"retry_possibly_billed": retry, "max_failed": ROWS}
    ended = harvest(mock, tmp_path, sums(ROWS), run=run)
    assert ended.exit_code == 0
    assert "deleted its results" in complaints(ended.store)
    assert batches(ended.store)[0] == ("ended", "in_progress")
    assert (ended.totals.possibly_billed, ended.totals.errors["results_deleted"]) == (ROWS, ROWS)
    assert ended.billed["requests"] == (ROWS if retry else 0)
    assert {letter["code"] for letter in ended.letters} == (set() if retry else {"possibly_billed"})
    with Journal.open(ended.store, read_only=True) as journal:
        listed = journal.possibly_billed(in_flight=True)
    assert {attempt.code for attempt in listed} == {"results_deleted"}
    assert len(listed) == ROWS


def test_lines_that_a_completed_batch_left_out_may_have_been_billed(mock_teacher, tmp_path: Path):
    mock = mock_teacher(batches=BatchSettings(missing_every=5))
    run = {"retry_possibly_billed": False, "max_failed": 2}
    ended = harvest(mock, tmp_path, sums(ROWS), run=run)
    assert (ended.exit_code, ended.totals.possibly_billed) == (0, 2)
    assert ended.billed["requests"] == ended.billed["bodies"] == ROWS
    assert {letter["code"] for letter in ended.letters} == {"possibly_billed"}


def test_rows_without_a_line_are_paid_again_a_few_times_only(mock_teacher, tmp_path: Path):
    """As after single replies without an answer: three rows of a small run, and one for every twenty."""
    mock = mock_teacher(batches=BatchSettings(missing_every=2))
    ended = harvest(mock, tmp_path, sums(ROWS), run={"max_failed": ROWS, "max_attempts": 9})
    assert ended.exit_code == 0
    assert ROWS < ended.billed["requests"] <= ROWS + 3
    assert {letter["code"] for letter in ended.letters} == {"broken_answer"}


def test_a_provider_that_refuses_batches_ends_the_run_or_leaves_it_to_single_requests(
    mock_teacher, tmp_path: Path
):
    mock = mock_teacher()
    faults = [{"action": "status", "status": 404, "on": "upload"}]
    ended = harvest(mock, tmp_path, sums(ROWS), faults)
    assert (ended.exit_code, ended.billed["requests"]) == (4, 0)
    assert waiting(ended.store).rows == 0
    hybrid = harvest(mock, tmp_path, sums(ROWS), faults, transport="hybrid")
    assert hybrid.exit_code == 0
    require_whole(ended.store, mock, ROWS)


def test_a_provider_that_takes_no_batches_for_now_parks_the_run(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    faults = [{"action": "status", "status": 429, "on": "upload", "retry_after": 9}]
    ended = harvest(mock, tmp_path, sums(ROWS), faults, run={"patience_s": 5})
    assert (ended.exit_code, ended.fired, waiting(ended.store).rows) == (10, 1, 0)
    assert harvest(mock, tmp_path, sums(ROWS)).exit_code == 0
    require_whole(ended.store, mock, ROWS)


def test_another_model_in_a_batch_parks_a_strict_run_and_loses_no_line_of_it(mock_teacher, tmp_path: Path):
    """The whole batch is paid: its other lines are taken in, too."""
    mock = mock_teacher(batches=BatchSettings(model_every=4))
    ended = harvest(mock, tmp_path, sums(ROWS), run={"strict_model": True}, api={"max_requests": 6})
    assert (ended.exit_code, "another teacher answers now" in ended.output) == (10, True)
    assert ended.totals.answers == 6
    assert pauses.clear_without_run(ended.store)
    again = harvest(mock, tmp_path, sums(ROWS), run={"strict_model": True})
    assert (again.exit_code, again.totals.answers, again.billed["requests"]) == (10, ROWS, 0)
    require_whole(ended.store, mock, ROWS)


def stopped_while_creating(mock: RunningMock, tmp_path: Path) -> None:
    """Run until a batch is created whose creation is not answered, and stop."""
    asked: list[threading.Thread] = []

    def watch(_: Mapping[str, Any]) -> None:
        if not asked and mock.batches()["served"].get("create"):
            stop = threading.Thread(target=client.ask, args=(tmp_path / "store", "stop"), daemon=True)
            asked.append(stop)
            stop.start()

    faults = [{"action": "silence", "on": "create", "nth": 1}]
    ended = harvest(mock, tmp_path, sums(ROWS), faults, watch=watch, run={"grace_s": 1})
    assert (ended.exit_code, ended.fired, len(asked)) == (10, 1, 1)


def test_a_run_that_is_stopped_while_its_last_batch_is_sent_ends(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    stopped_while_creating(mock, tmp_path)
    again = harvest(mock, tmp_path, sums(ROWS))
    assert again.exit_code == 0, again.output
    require_whole(again.store, mock, ROWS)


def test_a_pass_whose_rows_are_all_read_waits_for_a_batch_that_is_being_confirmed(
    mock_teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it was written down that the batch exists, none seemed to hold the rows: the run parked."""
    mock = mock_teacher()
    stopped_while_creating(mock, tmp_path)
    note_created, finish = submission.note_created, BatchTransport.finish
    is_confirming, all_read = asyncio.Event(), asyncio.Event()

    async def finish_meanwhile(self: BatchTransport) -> None:
        await asyncio.wait_for(is_confirming.wait(), PATIENCE_S)
        all_read.set()
        await finish(self)

    async def note_created_late(*arguments: Any) -> Any:
        is_confirming.set()
        await all_read.wait()
        await asyncio.sleep(0.01)
        return await note_created(*arguments)

    monkeypatch.setattr(BatchTransport, "finish", finish_meanwhile)
    monkeypatch.setattr(submission, "note_created", note_created_late)
    ended = harvest(mock, tmp_path, sums(ROWS))
    assert ended.exit_code == 0, ended.output
    require_whole(tmp_path / "store", mock, ROWS)

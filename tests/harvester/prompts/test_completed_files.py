"""Test reruns over completed prompt files: no row is read, the totals are the same, open rows are asked."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harvester.api.types import Request
from harvester.mock_teacher.running import RunningMock
from harvester.prompts import feed
from harvester.run.prepare import look_ahead
from harvester.store import verify
from harvester.store.journal import sqlite
from harvester.store.journal.journal import Journal
from harvester.store.journal.rows import forget_finished
from harvester.store.maintain import purge, repair
from harvester.store.reader import Corpus
from tests.faults.bench import Ended, run_harvest

Mock = Callable[..., RunningMock]
MANY = (*(f"What is {n} + {2 * n}?" for n in range(12)), "What is 3 + 6?")
COUNTED = ("rows_total", "rows", "from_cache", "duplicates", "dead", "requests_sent", "rows_left")


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that a run makes of its prompt files."""
    built: list[Request] = []
    requests = feed.requests

    def noting(*arguments: Any) -> Any:
        for request in requests(*arguments):
            built.append(request)
            yield request

    monkeypatch.setattr(feed, "requests", noting)
    return built


def ran(mock: RunningMock, root: Path, *faults: dict[str, Any], **more: Any) -> tuple[Ended, dict[str, Any]]:
    messages: list[Any] = []
    ended = run_harvest(mock, root, faults, watch=messages.append, **{"prompts": MANY, **more})
    return ended, {name: messages[-1][name] for name in COUNTED}


def remembered(root: Path) -> int:
    with closing(sqlite.open_for_reading(root / "store")) as connection:
        if not sqlite.has_table(connection, "finished"):
            return 0
        return connection.execute("SELECT count(*) FROM finished").fetchone()[0]


def test_a_finished_file_is_not_walked_and_the_counts_are_those_of_a_walk(
    mock_teacher: Mock, tmp_path: Path, looked_at: list[Request]
) -> None:
    mock = mock_teacher()
    first, _ = ran(mock, tmp_path)
    assert (first.exit_code, first.billed["requests"], remembered(tmp_path)) == (0, 12, 1)
    with closing(Journal.open(tmp_path / "store")) as journal, journal.writing() as connection:
        connection.execute("DELETE FROM finished")
    looked_at.clear()
    walked, counts = ran(mock, tmp_path)
    assert (len(looked_at), walked.billed["requests"], counts["from_cache"]) == (13, 0, 13)
    looked_at.clear()
    again, same = ran(mock, tmp_path)
    assert (len(looked_at), again.exit_code, again.billed["requests"]) == (0, 0, 0)
    assert same == counts
    assert look_ahead(tmp_path / "harvest.toml").cached == 13
    assert Corpus.open(tmp_path / "store").verify() == []


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        ({"prompts": (*MANY, "What is 100 + 1?")}, 1),
        ({"prompts": ("What is 100 + 2?", *MANY[1:])}, 1),
        ({"sampling": {"temperature": 0.5}}, 12),
        ({"sampling": {"samples": 2}}, 12),
        ({"prompt_table": {"system": "Be brief."}}, 12),
        ({"run": {"epoch": 1}}, 12),
    ],
)
def test_what_changes_is_asked_and_nothing_else(
    mock_teacher: Mock, tmp_path: Path, change: dict[str, Any], sent: int
) -> None:
    mock = mock_teacher()
    ran(mock, tmp_path)
    assert ran(mock, tmp_path, **change)[0].billed["requests"] == sent
    assert ran(mock, tmp_path, **change)[0].billed["requests"] == 0
    assert ran(mock, tmp_path)[0].billed["requests"] == 0


def test_a_purged_key_is_asked_again_and_no_other(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ran(mock, tmp_path)
    (key,) = {s.key for s in Corpus.open(tmp_path / "store").samples() if "5 + 10" in str(s.messages)}
    assert purge.purge_store(tmp_path / "store", key, None) == 1
    assert remembered(tmp_path) == 0
    assert ran(mock, tmp_path)[0].billed["requests"] == 1
    assert (remembered(tmp_path), ran(mock, tmp_path)[0].billed["requests"]) == (1, 0)


def test_what_a_repair_gives_up_is_asked_again(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ran(mock, tmp_path, prompts=MANY[:4])
    ran(mock, tmp_path)
    shards = sorted((tmp_path / "store" / "shards").glob("*.parquet"))
    assert len(shards) == 2
    shards[0].unlink()
    assert len(repair.repair_store(tmp_path / "store").lost) == 4
    assert remembered(tmp_path) == 0
    assert ran(mock, tmp_path)[0].billed["requests"] == 4


def test_dead_letters_get_their_chance_and_rejected_ones_are_counted_each_time(
    mock_teacher: Mock, tmp_path: Path, looked_at: list[Request]
) -> None:
    mock = mock_teacher()
    gone = {"action": "status", "status": 500, "prompt": "What is 5 + 10?"}
    refused = {"action": "status", "status": 400, "prompt": "What is 7 + 14?"}
    first, counts = ran(mock, tmp_path, gone, refused)
    assert (first.exit_code, counts["dead"], remembered(tmp_path)) == (3, 2, 0)
    second, counts = ran(mock, tmp_path)
    assert (second.billed["requests"], counts["dead"], remembered(tmp_path)) == (1, 1, 0)
    third, walked = ran(mock, tmp_path)
    assert (third.exit_code, walked["dead"], walked["from_cache"], remembered(tmp_path)) == (3, 1, 12, 1)
    looked_at.clear()
    fourth, same = ran(mock, tmp_path)
    assert (fourth.exit_code, len(looked_at), same) == (3, 0, walked)


def test_a_changed_row_is_reported_and_not_used(
    mock_teacher: Mock, tmp_path: Path, looked_at: list[Request]
) -> None:
    mock = mock_teacher()
    ran(mock, tmp_path)
    with closing(sqlite3.connect(tmp_path / "store" / "journal.db")) as connection, connection:
        connection.execute("UPDATE finished SET rows = 14")
    (finding,) = Corpus.open(tmp_path / "store").verify()
    assert isinstance(finding, verify.Finding)
    assert (finding.kind, finding.place) == ("changed", "journal.db finished")
    looked_at.clear()
    _, counts = ran(mock, tmp_path)
    assert (len(looked_at), counts["rows_total"]) == (13, 13)
    assert Corpus.open(tmp_path / "store").verify() == []


def test_a_file_that_changes_while_it_is_asked_is_not_finished(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()

    def grow(_: Any) -> None:
        with (tmp_path / "p.jsonl").open("a") as file:
            file.write("\n")

    assert run_harvest(mock, tmp_path, prompts=MANY, watch=grow).exit_code == 0
    assert remembered(tmp_path) == 0


def test_what_stays_at_home_may_be_turned_back_and_the_last_word_holds(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    other = {"id": "b", "prompt": "What is 2 + 2?", "reference": "other"}

    def run_with(*references: str) -> tuple[int, dict[str, str]]:
        rows = [{"id": "a", "prompt": "What is 2 + 2?", "reference": reference} for reference in references]
        ended, _ = ran(mock, tmp_path, prompts=[*rows, other])
        references_held = [
            (row.prompt_id, row.reference) for row in Corpus.open(tmp_path / "store").samples()
        ]
        assert (ended.exit_code, len(references_held)) == (0, 2)
        return ended.totals.asks, dict(references_held)

    for word in ("one", "two", "one", "two"):
        asks, result = run_with(word)
        assert result == {"a": word, "b": "other"}
    assert run_with("two") == (asks, result)  # known: nothing is written
    with closing(Journal.open(tmp_path / "store")) as journal, journal.writing() as connection:
        forget_finished(connection)
    assert run_with("two") == (asks, result)  # nor when each row is looked at
    assert run_with("two", "three", "four")[1]["a"] == "four"
    assert run_with("four", "one")[1]["a"] == "one"
    assert run_with("one", "four", "one")[1]["a"] == "one"
    assert mock.totals()["answers"] == 1
    assert Corpus.open(tmp_path / "store").verify() == []

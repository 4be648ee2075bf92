"""Test the journal: what is stored, what is counted, what is refused."""

from __future__ import annotations

import json
import sqlite3

import pytest

from harvester.errors import StoreCorrupt, StoreError, StoreFormatError, StoreFull
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import DeadLetter, Failure, Refund, SharedAnswer, asker_digest
from tests.harvester.store_rows import (
    AT,
    answer,
    fill,
    intent,
    key_of,
    open_store,
    prompt_of,
    run_record,
    without_outcome,
)


def dead(number: int, code: str = "prompt_rejected") -> DeadLetter:
    return DeadLetter(key_of(number), prompt_of(number), 0, answer(number).body, code, "too long", 2, AT)


def test_an_answer_is_held_after_reopening(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(3))
    with Journal.open(tmp_path, read_only=True) as journal:
        held = journal.look_up([key_of(n) for n in range(5)])
    assert set(held) == {key_of(n) for n in range(3)}
    held_answer = held[key_of(1)]
    assert (held_answer.state, held_answer.outcome, held_answer.max_tokens) == ("answered", "ok", 64)
    assert held_answer.asker == asker_digest(prompt_of(1), 0)


def test_every_intent_ends_once_and_the_rest_was_possibly_billed(tmp_path):
    with open_store(tmp_path) as journal:
        journal.apply([intent(n) for n in range(5)])
        journal.apply(
            [
                answer(0),
                Refund(2),
                Failure(3, key_of(2), "unavailable", 503, b"<html>" * 1000, False, AT),
                Failure(4, key_of(3), "timeout", None, b"", True, AT),
            ]
        )
        assert [attempt.attempt_id for attempt in without_outcome(journal)] == [5]
        assert without_outcome(journal, in_flight=False) == []
        assert journal.totals().possibly_billed == 1
    with open_store(tmp_path, run_id="run-2") as journal:  # run-1 never ended: it was killed
        (lost,) = without_outcome(journal, in_flight=False)
        assert (lost.key, lost.run_id, lost.at, lost.reserved_microusd) == (key_of(4), "run-1", AT, 9)
        totals = journal.totals("run-1")
        assert (totals.attempts, totals.answers, totals.refunds) == (5, 1, 1)
        assert (totals.possibly_billed, totals.possibly_billed_microusd) == (2, 18)
        assert totals.errors == {"unavailable": 1, "timeout": 1}
        assert totals.outcomes == {"ok": 1}
        assert (totals.input_tokens, totals.output_tokens, totals.cost_microusd) == (12, 3, 7)
        assert journal.totals("run-2").attempts == 0
        assert journal.totals() == totals


def test_attempt_numbers_are_never_used_again(tmp_path):
    with open_store(tmp_path) as journal:
        assert journal.next_attempt_id() == 1
        journal.apply([intent(n) for n in range(3)])
        journal.apply([Refund(n) for n in range(1, 4)])
    with Journal.open(tmp_path) as journal:
        assert journal.next_attempt_id() == 4


def test_a_dead_row_comes_back_to_life_when_it_is_answered(tmp_path):
    with open_store(tmp_path) as journal:
        journal.apply([dead(0), dead(1, "unavailable")])
        held = journal.look_up([key_of(0), key_of(1)])
        assert {(entry.state, entry.outcome) for entry in held.values()} == {
            ("dead", "prompt_rejected"),
            ("dead", "unavailable"),
        }
        assert journal.write_dead_letters(tmp_path) == 2
        lines = [json.loads(line) for line in (tmp_path / "dead_letters.jsonl").read_text().splitlines()]
        assert {line["code"] for line in lines} == {"prompt_rejected", "unavailable"}
        assert {(line["prompt_id"], line["file"], line["line"]) for line in lines} == {
            ("p0", "prompts/sum.jsonl", 1),
            ("p1", "prompts/sum.jsonl", 2),
        }
        fill(journal, [0, 1])
        assert {entry.state for entry in journal.look_up([key_of(0), key_of(1)]).values()} == {"answered"}
        assert journal.write_dead_letters(tmp_path) == 0
    assert not (tmp_path / "dead_letters.jsonl").exists()


def test_a_key_is_stored_once_and_a_second_payment_is_counted(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, [0])
        journal.apply([intent(0, attempt_id=2)])
        journal.apply([answer(0, attempt_id=2, raw=b"other")])
        totals = journal.totals()
        assert (totals.answers, totals.paid_twice, totals.cost_microusd) == (1, 1, 14)
        assert without_outcome(journal) == []


def test_further_askers_are_remembered_once_and_the_last_word_of_each_holds(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, [0])
        other = SharedAnswer(key_of(0), prompt_of(0, id="twin"), 0)
        relabelled = SharedAnswer(key_of(0), prompt_of(0, metadata={"split": "held_out"}), 0)
        journal.apply([other, relabelled, other])
        journal.apply([other])
        held = journal.look_up([key_of(0)])[key_of(0)]
        for known in (other.prompt, relabelled.prompt):
            assert held.last_digest(known.id, 0) == asker_digest(known, 0)
        assert (
            held.last_digest("p0", 0)
            != asker_digest(prompt_of(0), 0)
            == held.asker
            == held.last_digest("?", 0)
        )
        assert journal.totals().asks == 3
        with journal.reading() as connection:
            assert connection.execute("SELECT count(*) FROM asks").fetchone() == (2,)


def test_odd_prompts_are_kept(tmp_path):
    odd = prompt_of(
        0,
        metadata={"when": object, "nan": float("nan"), "deep": [{"a": 2**70}], "s": "\udcff"},
        file="\udcff.jsonl",
    )
    with open_store(tmp_path) as journal:
        journal.apply([answer(0, prompt=odd)])
        assert journal.look_up([key_of(0)])[key_of(0)].asker == asker_digest(odd, 0)


def test_a_record_that_can_not_be_written_leaves_the_journal_usable(tmp_path):
    with open_store(tmp_path) as journal:
        with pytest.raises(TypeError):
            journal.apply([answer(0), answer(1, body={"messages": object()})])
        assert journal.look_up([key_of(0)]) == {}
        fill(journal, [0])
        assert len(journal.look_up([key_of(0)])) == 1


def test_a_full_disk_is_named_and_nothing_more_is_acknowledged(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(3))
        with journal.reading() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count={pages + 2}")
        with pytest.raises(StoreFull, match="full"):
            fill(journal, range(100, 2000))
        with journal.reading() as connection:
            connection.execute("PRAGMA max_page_count=1000000")
        with pytest.raises(StoreFull):  # there is room again, yet a failed commit is never retried blindly
            journal.apply([intent(5000)])
        assert len(journal.look_up([key_of(n) for n in range(2000)])) == 3
    with Journal.open(tmp_path) as journal:
        assert len(journal.look_up([key_of(n) for n in range(2000)])) == 3


def test_a_reader_can_not_write_and_a_missing_store_is_named(tmp_path):
    with pytest.raises(StoreError, match="no journal"):
        Journal.open(tmp_path / "nowhere", read_only=True)
    open_store(tmp_path).close()
    with Journal.open(tmp_path, read_only=True) as journal, pytest.raises(StoreError):
        journal.begin_run(run_record("run-2"))


@pytest.mark.parametrize(
    ("version", "advice"), [(2, "newer release"), (99, "newer release"), (-1, "wrote it")]
)
def test_another_format_is_refused_with_advice(tmp_path, version, advice):
    open_store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute(f"PRAGMA user_version={version}")
    connection.close()
    for read_only in (False, True):
        with pytest.raises(StoreFormatError, match=advice):
            Journal.open(tmp_path, read_only=read_only)


def test_a_foreign_database_and_junk_are_distinguished(tmp_path):
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with pytest.raises(StoreFormatError, match="not a journal"):
        Journal.open(tmp_path)
    (tmp_path / "journal.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreCorrupt):
        Journal.open(tmp_path)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        Journal.open(tmp_path / "file" / "store")


def test_runs_remember_how_they_ended(tmp_path):
    with open_store(tmp_path) as journal:
        journal.end_run("run-1", "complete", 0, AT + 5)
        journal.begin_run(run_record("run-2"))
        journal.begin_run(run_record("run-3"))
        with journal.reading() as connection:
            rows = connection.execute("SELECT run_id, ending, exit_code, ended_us FROM runs").fetchall()
    assert rows == [
        ("run-1", "complete", 0, round((AT + 5) * 1e6)),
        ("run-2", "killed", None, None),
        ("run-3", "", None, None),
    ]

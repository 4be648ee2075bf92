"""Test that answers converted during a run give the same shard, and that the journal decides its rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.store.journal.journal import Journal
from harvester.store.shards import ready_rows
from harvester.store.shards.ready_rows import ROWS_PER_SLICE, ReadyRows
from harvester.store.shards.seal import seal, seal_steps
from harvester.store.shards.steps import run_to_end
from tests.harvester.store_rows import answer, fill, key_of, open_store, raw_of, run_record

MIB = 1024 * 1024
SLICES = 3
ROWS = SLICES * ROWS_PER_SLICE + 17


def shards_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store / "shards").glob("*.parquet"))}


def seal_with(journal: Journal, store: Path, ready: ReadyRows) -> int:
    return run_to_end(seal_steps(journal, store, target_bytes=64 * MIB, everything=True, ready=ready)).rows


def converted(journal: Journal, ready: ReadyRows) -> int:
    steps = 0
    while ready.step(journal):
        steps += 1
    return steps


def test_what_lay_ready_is_not_read_again_and_gives_the_same_bytes(tmp_path, monkeypatch):
    with open_store(tmp_path / "plain") as journal:
        fill(journal, range(ROWS))
        seal(journal, tmp_path / "plain", target_bytes=64 * MIB, everything=True)
    ready, steps, begun = ReadyRows(), 0, 0
    with open_store(tmp_path / "ready") as journal:
        for end in (100, 150, 300, ROWS):  # answers come while they are converted
            fill(journal, range(begun, end))
            begun, steps = end, steps + converted(journal, ready)
        assert steps == SLICES
        read = ready_rows.read_slice
        after = []
        monkeypatch.setattr(
            "harvester.store.shards.seal.read_slice", lambda *args: after.append(args[-1]) or read(*args)
        )
        assert seal_with(journal, tmp_path / "ready", ready) == ROWS
    assert after == [SLICES * ROWS_PER_SLICE, ROWS]  # only the rest, and the end
    assert shards_of(tmp_path / "ready") == shards_of(tmp_path / "plain")


def test_an_answer_that_left_the_journal_meanwhile_is_not_sealed(tmp_path):
    ready = ReadyRows()
    with open_store(tmp_path) as journal:
        fill(journal, range(ROWS))
        assert converted(journal, ready) == SLICES
        with journal.writing() as connection:
            connection.execute("DELETE FROM answers WHERE key = ?", (key_of(ROWS_PER_SLICE + 5),))
        assert seal_with(journal, tmp_path, ready) == ROWS - 1
    keys = set(pq.read_table(tmp_path / "shards").column("key").to_pylist())
    assert keys == {key_of(n).hex() for n in range(ROWS) if n != ROWS_PER_SLICE + 5}


def test_an_answer_that_came_in_the_place_of_another_is_sealed_instead(tmp_path):
    ready = ReadyRows()
    with open_store(tmp_path) as journal:
        fill(journal, range(ROWS_PER_SLICE))
        assert converted(journal, ready) == 1
        last = ROWS_PER_SLICE - 1
        with journal.writing() as connection:
            connection.execute("DELETE FROM answers WHERE key = ?", (key_of(last),))
        journal.apply([answer(last, raw=raw_of(last, content="another"))])  # gets the same id
        assert seal_with(journal, tmp_path, ready) == ROWS_PER_SLICE
    assert pq.read_table(tmp_path / "shards").column("completion").to_pylist()[last] == "another"


def test_only_so_much_lies_ready(tmp_path, monkeypatch):
    monkeypatch.setattr(ready_rows, "MOST_READY_BYTES", 1)
    ready = ReadyRows()
    with open_store(tmp_path) as journal:
        fill(journal, range(ROWS))
        assert converted(journal, ready) == 1
        assert seal_with(journal, tmp_path, ready) == ROWS
        fill(journal, range(ROWS, ROWS + ROWS_PER_SLICE))  # ids begin anew
        assert converted(journal, ready) == 1
        assert seal_with(journal, tmp_path, ready) == ROWS_PER_SLICE


def test_answers_of_earlier_runs_are_converted_with_those_of_this_one(tmp_path):
    for name in ("plain", "ready"):
        store, ready = tmp_path / name, ReadyRows()
        with open_store(store) as journal:
            fill(journal, range(50))
            journal.begin_run(run_record("run-2", purpose="eval"))
            fill(journal, range(50, 90))
            journal.begin_run(run_record("run-3"))
            fill(journal, range(90, 400))
            if name == "ready":
                assert converted(journal, ready) == 2
            assert seal_with(journal, store, ready) == 400
    assert shards_of(tmp_path / "ready") == shards_of(tmp_path / "plain")


@settings(max_examples=15, deadline=None)
@given(actions=st.lists(st.sampled_from(["fill", "convert", "drop", "seal"]), max_size=10))
def test_whatever_happens_meanwhile_the_shards_hold_what_the_journal_held(tmp_path_factory, actions):
    store, ready = tmp_path_factory.mktemp("store"), ReadyRows()
    held: set[int] = set()
    count = 0
    with open_store(store) as journal:
        for action in [*actions, "seal"]:
            if action == "fill":
                fill(journal, range(count, count + 90))
                held |= set(range(count, count + 90))
                count += 90
            elif action == "convert":
                ready.step(journal)
            elif action == "seal":
                seal_with(journal, store, ready)
            elif held:
                with journal.writing() as connection:
                    gone = max(held)
                    if connection.execute("DELETE FROM answers WHERE key = ?", (key_of(gone),)).rowcount:
                        held.remove(gone)
    shards = (store / "shards").glob("*.parquet")
    keys = [key for path in shards for key in pq.read_table(path).column("key").to_pylist()]
    assert sorted(keys) == sorted(key_of(n).hex() for n in held)

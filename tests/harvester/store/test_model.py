"""Compare the store with a dict: after any operations in any order it holds what it acknowledged, no more."""

from __future__ import annotations

import os
import shutil

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from harvester.errors import StoreFull, StoreLocked
from harvester.store.journal import lock
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import Failure, Refund
from harvester.store.reader import Corpus
from harvester.store.shards import compact
from harvester.store.shards.seal import seal, seal_steps
from tests.harvester.killed_runs import quick_folder
from tests.harvester.store_rows import AT, answer, intent, key_of, run_record, verified, without_outcome

MIB = 1024 * 1024


class StoreMachine(RuleBasedStateMachine):
    """`answered` and `in_flight` are the model; everything else is real files."""

    @initialize()
    def begin(self) -> None:
        self._place = quick_folder()
        self.root = self._place.__enter__()
        self.runs = 0
        self.store = self.root / "store-0"
        self.answered: set[int] = set()
        self.in_flight: dict[int, int] = {}  # attempt -> row, of this life
        self.lost: set[int] = set()  # attempts of earlier lives without an outcome
        self.maybe = 0
        self.open()

    def open(self) -> None:
        self.runs += 1
        self.lock = StoreLock(self.store, started_at=0.0)
        self.lock.__enter__()
        self.journal = Journal.open(self.store)
        self.journal.begin_run(run_record(f"run-{self.runs}"))
        self.lost |= set(self.in_flight)
        self.in_flight = {}
        self.is_open = True

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.journal.close()
            self.lock.__exit__(None, None, None)

    def teardown(self) -> None:
        if hasattr(self, "journal"):
            self.close()
            self._place.__exit__(None, None, None)

    # --- what a harvest does

    @rule(rows=st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True))
    def submit(self, rows: list[int]) -> None:
        held = self.journal.look_up([key_of(row) for row in rows])
        fresh = [row for row in rows if key_of(row) not in held and row not in self.in_flight.values()]
        assert {row for row in rows if key_of(row) in held} == self.answered & set(rows)
        first = self.journal.next_attempt_id()
        if fresh:
            numbers = range(first, first + len(fresh))
            pairs = dict(zip(numbers, fresh, strict=True))
            self.journal.apply([intent(row, f"run-{self.runs}", attempt) for attempt, row in pairs.items()])
            self.in_flight |= pairs

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.in_flight)), min_size=1, unique=True))
        self.journal.apply([answer(self.in_flight[attempt], attempt_id=attempt) for attempt in chosen])
        self.answered |= {self.in_flight.pop(attempt) for attempt in chosen}

    @precondition(lambda self: self.in_flight)
    @rule(billed=st.booleans())
    def fail(self, billed: bool) -> None:
        attempt, row = self.in_flight.popitem()
        if billed:
            self.journal.apply([Failure(attempt, key_of(row), "timeout", None, b"", True, AT)])
            self.maybe += 1
        else:
            self.journal.apply([Refund(attempt)])

    @rule()
    def seal(self) -> None:
        seal(self.journal, self.store, target_bytes=MIB, everything=True)

    @rule()
    def merge(self) -> None:
        for _ in compact.compact_steps(self.journal, self.store, target_bytes=MIB):
            pass

    # --- what happens to it

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    @rule(doing=st.sampled_from(["nothing", "sealing", "merging"]), steps=st.integers(0, 8))
    def crash(self, doing: str, steps: int) -> None:
        """The files as they are now are all that the next life finds."""
        work = iter(())
        if doing == "sealing":
            work = seal_steps(self.journal, self.store, target_bytes=MIB, everything=True)
        elif doing == "merging":
            work = compact.compact_steps(self.journal, self.store, target_bytes=MIB)
        for _, _step in zip(range(steps), work, strict=False):
            pass
        after = self.root / f"store-{self.runs}"
        shutil.copytree(self.store, after)
        if hasattr(work, "close"):
            work.close()
        self.close()
        shutil.rmtree(self.store)
        self.store = after
        self.open()

    @rule()
    def second_process(self) -> None:
        with pytest.raises(StoreLocked, match=f"pid {os.getpid()}"), StoreLock(self.store, started_at=0.0):
            pass

    @rule(rows=st.integers(200, 400))
    def full_disk(self, rows: int) -> None:
        first = self.journal.next_attempt_id()
        with self.journal.reading() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            (free,) = connection.execute("PRAGMA freelist_count").fetchone()
            connection.execute(f"PRAGMA max_page_count={pages + 1}")
        if free < 20:
            with pytest.raises(StoreFull):
                self.journal.apply([answer(1000 + n, attempt_id=first + n) for n in range(rows)])
            with pytest.raises(StoreFull):
                self.journal.apply([intent(2000, f"run-{self.runs}", first)])
        self.reopen()

    @precondition(lambda self: list((self.store / "shards").glob("*.parquet")))
    @rule(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), which=st.integers(0, 9))
    def corrupt_byte(self, place: float, bit: int, which: int) -> None:
        paths = sorted((self.store / "shards").glob("*.parquet"))
        path = paths[which % len(paths)]
        inside = {self.row_of(key) for key in pq.read_table(path, columns=["key"])["key"].to_pylist()}
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 1 << bit
        path.write_bytes(content)
        self.close()
        assert any(path.name in str(entry) for entry in Corpus.open(self.store).verify())
        data, left = verified(self.store, repair=True)
        assert left == 0
        lost = {self.row_of(key) for key in data["repaired"]["lost"]}
        assert lost <= inside
        self.answered -= lost
        self.open()

    # --- what must hold

    @staticmethod
    def row_of(key: str) -> int:
        return ROWS[key]

    @invariant()
    def holds_what_it_acknowledged(self) -> None:
        if not hasattr(self, "journal"):
            return
        keys = [sample.key for sample in Corpus.open(self.store).samples(["key"])]
        assert sorted(keys) == sorted(key_of(row).hex() for row in self.answered)
        if any((self.store / "shards").glob("*.parquet")):
            plain = pq.read_table(self.store / "shards", columns=["key"])["key"].to_pylist()
            assert len(plain) == len(set(plain))
            assert set(plain) <= set(keys)
        assert {entry.attempt_id for entry in without_outcome(self.journal)} == self.lost | set(
            self.in_flight
        )
        totals = self.journal.totals()
        assert totals.possibly_billed == len(self.lost) + self.maybe
        assert totals.paid_twice == 0

    @invariant()
    def verifies(self) -> None:
        if hasattr(self, "journal"):
            assert Corpus.open(self.store).verify() == []


ROWS = {key_of(row).hex(): row for row in range(61)}


@pytest.mark.parametrize(
    "examples", [pytest.param(12, marks=pytest.mark.slow), pytest.param(300, marks=pytest.mark.torture)]
)
def test_the_store_behaves_as_a_dict_of_what_it_acknowledged(
    examples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)  # a second process is tried often
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

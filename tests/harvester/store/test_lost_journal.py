"""Test a journal that is missing, emptied, unreadable or changed: it is named, and no new one is made."""

from __future__ import annotations

import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from harvester.errors import StoreCorrupt, StoreError
from harvester.store.journal import wal
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from tests.harvester.store_rows import answer, fill, key_of, open_store, raw_of, verified

MIB = 1024 * 1024


def make(store: Path) -> None:
    with StoreLock(store, started_at=0.0), open_store(store) as journal:
        fill(journal, range(5))
        seal(journal, store, target_bytes=MIB, everything=True)


def findings_of(store: Path) -> list[str]:
    data, left = verified(store, repair=False)
    assert left == len(data["findings"])
    return data["findings"]


def lose(store: Path, how: str) -> None:
    for path in store.glob("journal.db*"):
        path.unlink()
    if how == "emptied":
        (store / "journal.db").touch()


@pytest.mark.parametrize("how", ["gone", "emptied"])
def test_a_lost_journal_is_named_and_no_new_one_is_made_beside_sealed_answers(tmp_path, how):
    store, bare = tmp_path / "store", tmp_path / "bare"
    make(store)
    lose(store, how)
    (finding,) = findings_of(store)
    assert "journal.db" in finding
    with pytest.raises(StoreCorrupt, match=r"journal\.db.*sealed answers") as refused:
        Journal.open(store)
    assert "copy" in refused.value.remedy
    assert (store / "journal.db").exists() == (how == "emptied")
    shutil.copytree(store / "shards", bare / "shards")
    assert findings_of(bare) == []  # a copy of the shards alone is a corpus, and whole


def test_a_lost_journal_is_named_where_nothing_was_sealed(tmp_path):
    with StoreLock(tmp_path, started_at=0.0), open_store(tmp_path) as journal:
        fill(journal, range(5))
    lose(tmp_path, "gone")
    (finding,) = findings_of(tmp_path)
    assert finding.startswith("missing: journal.db")
    with pytest.raises(StoreCorrupt, match="journal"):
        verify_with_bill(tmp_path, repair=True)
    assert not (tmp_path / "journal.db").exists()


def test_a_journal_that_can_not_be_opened_is_a_finding_with_another_remedy_than_verify(tmp_path):
    make(tmp_path)
    path = tmp_path / "journal.db"
    content = path.read_bytes()
    path.write_bytes(b"nonsense" + content[8:])
    assert [entry.partition(":")[0] for entry in findings_of(tmp_path)] == ["damaged"]
    with pytest.raises(StoreCorrupt) as refused:
        verify_with_bill(tmp_path, repair=True)
    assert "verify" not in refused.value.remedy
    path.write_bytes(content)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version=2")
    assert ["format 2" in entry for entry in findings_of(tmp_path)] == [True]


def test_torn_files_of_a_bare_folder_are_findings_each_by_name(tmp_path):
    make(tmp_path / "store")
    (complete,) = (tmp_path / "store" / "shards").iterdir()
    for name in ("a.parquet", "b.parquet", "c.parquet"):
        shutil.copy(complete, tmp_path / name)
    for name in ("a.parquet", "c.parquet"):
        (tmp_path / name).write_bytes(complete.read_bytes()[:-9])
    assert [entry.split(": ")[1].rpartition("/")[2] for entry in findings_of(tmp_path)] == [
        "a.parquet",
        "c.parquet",
    ]


# --- the write-ahead log -------------------------------------------------------------------------------


def as_killed(store: Path, answers: int) -> Path:
    """A copy of the files as they lie while the journal is open, which is what a kill leaves."""
    copy = store.with_name(f"{store.name}-killed")
    with open_store(store) as journal:
        fill(journal, range(5))
        seal(journal, store, target_bytes=MIB, everything=True)
        for number in range(5, 5 + answers):
            journal.apply([answer(number, raw=raw_of(number, content="x" * 3000))])
        shutil.copytree(store, copy)
    (copy / "journal.db-shm").unlink()
    return copy


def test_a_changed_byte_in_the_log_is_named_and_refused_and_repair_keeps_what_still_reads(tmp_path):
    store = as_killed(tmp_path / "store", 30)
    log = store / "journal.db-wal"
    content = log.read_bytes()
    assert wal.commits_lost(log) == 0
    assert findings_of(store) == []
    changed = bytearray(content)
    changed[len(content) * 2 // 3] ^= 1
    log.write_bytes(changed)
    (finding,) = findings_of(store)
    assert finding.startswith("damaged: journal.db-wal: ")
    with pytest.raises(StoreCorrupt, match=r"journal\.db-wal"):
        Journal.open(store)
    data, left = verified(store, repair=True)
    assert (left, data["repaired"]["quarantined"]) == (0, ("journal.db-wal",))
    assert (store / "quarantine" / "journal.db-wal").read_bytes() == changed
    keys = {sample.key for sample in Corpus.open(store).samples(["key"])}
    assert {key_of(n).hex() for n in range(5)} <= keys < {key_of(n).hex() for n in range(35)}


def test_of_every_changed_byte_in_a_log_only_its_last_commit_is_silent(tmp_path):
    place = tmp_path / "one.db"
    with closing(sqlite3.connect(place, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b)")
        for _ in range(12):
            connection.execute("INSERT INTO t (b) VALUES (?)", ("x" * 900,))
        original, database = wal.log_path(place).read_bytes(), place.read_bytes()
    rng, named, copy = random.Random(4), 0, tmp_path / "copy.db"
    for cut in range(0, len(original), 997):  # a kill in the middle of a write is no damage
        wal.log_path(copy).write_bytes(original[:cut])
        assert wal.commits_lost(wal.log_path(copy)) == 0
    for _ in range(60):
        content = bytearray(original)
        content[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
        copy.write_bytes(database)
        wal.log_path(copy).write_bytes(content)
        lost = wal.commits_lost(wal.log_path(copy))
        with closing(sqlite3.connect(copy)) as connection:
            try:
                (rows,) = connection.execute("SELECT count(*) FROM t").fetchone()
            except sqlite3.OperationalError:  # not even the table is left
                rows = 0
        for path in tmp_path.glob("copy.db*"):
            path.unlink()
        assert (lost > 0) == (rows < 11)
        named += lost > 0
    assert named > 40


def test_nothing_is_made_of_a_folder_that_is_none(tmp_path):
    with pytest.raises(StoreError):
        verify_with_bill(tmp_path, repair=False)
    assert list(tmp_path.iterdir()) == []

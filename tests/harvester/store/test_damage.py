"""Test damage of a store: it is named and never covered up; leftovers of a kill and foreign files differ."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.errors import StoreCorrupt, StoreError, TermsRefused
from harvester.store.journal import checksums
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import Failure
from harvester.store.maintain import purge, seal_task
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.store.shards import compact
from harvester.store.shards.seal import finish_interrupted, seal
from harvester.store.verify import verify_journal
from harvester.system import failpoints
from tests.harvester.store_rows import answer, fill, intent, key_of, open_store, raw_of, run_record, verified

MIB = 1024 * 1024


def make(store: Path, parts: int = 2, rows: int = 5, unsealed: int = 0, first: int = 0) -> None:
    with open_store(store) as journal:
        for part in range(parts):
            fill(journal, range(first + part * rows, first + (part + 1) * rows))
            seal(journal, store, target_bytes=MIB, everything=True)
        fill(journal, range(first + parts * rows, first + parts * rows + unsealed))


def changed(store: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        assert connection.execute(statement, values).rowcount == 1


def sealed(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("*.parquet"))


def held(store: Path) -> list[str]:
    return sorted(sample.key for sample in Corpus.open(store).samples(["key"]))


def plain(store: Path) -> list[str]:
    return sorted(pq.read_table(store / "shards", columns=["key"])["key"].to_pylist())


def hexes(*numbers: int) -> list[str]:
    return sorted(key_of(number).hex() for number in numbers)


def _sealed_and_merged(journal: Journal, store: Path) -> None:
    seal(journal, store, target_bytes=MIB, everything=True)
    list(compact.compact_steps(journal, store, target_bytes=MIB))


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Seals and merges everything and is torn away at a failpoint, as by a kill."""

    def cut(store: Path, point: str) -> None:
        with monkeypatch.context() as patch:
            for name, value in (("_armed", point), ("_left", 1), ("_kind", "memory")):
                patch.setattr(failpoints, name, value)
            with Journal.open(store) as journal, pytest.raises(MemoryError):
                _sealed_and_merged(journal, store)

    return cut


# --- damage is not laundered --------------------------------------------------------------------------


def test_a_damaged_answer_is_named_by_every_sealing_and_only_it_is_asked_again(tmp_path):
    make(tmp_path, parts=1, unsealed=5)
    wrong = raw_of(7).replace(b'"8"', b'"7"')  # four bits: one alone would be put back
    changed(tmp_path, "UPDATE answers SET raw = ? WHERE key = ?", wrong, key_of(7))
    name = key_of(7).hex()
    with Journal.open(tmp_path) as journal, pytest.raises(StoreCorrupt, match=name):
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    with pytest.raises(StoreCorrupt, match=name):  # nor is it exported or trained on
        list(Corpus.open(tmp_path).samples())
    assert verified(tmp_path, repair=False)[0]["findings"] == [f"changed: journal.db answers: row {name}"]
    data, left = verified(tmp_path, repair=True)
    assert (left, data["repaired"]["lost"]) == (0, (name,))
    assert held(tmp_path) == hexes(0, 1, 2, 3, 4, 5, 6, 8, 9)
    with Journal.open(tmp_path) as journal:
        assert journal.look_up([key_of(7)]) == {}
        with journal.reading() as connection:  # repair asked no terms, so it sealed nothing
            assert connection.execute("SELECT count(*) FROM answers").fetchone() == (4,)


def test_a_damaged_index_row_is_named_by_a_merge_and_had_again_from_its_shard(tmp_path):
    make(tmp_path, parts=4)
    before = held(tmp_path)
    changed(tmp_path, "UPDATE keys SET max_tokens = 67 WHERE key = ?", key_of(3))
    with Journal.open(tmp_path) as journal, pytest.raises(StoreCorrupt, match=key_of(3).hex()):
        list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert not (tmp_path / ".shards.next").exists()
    data, left = verified(tmp_path, repair=True)
    assert (left, data["repaired"]["lost"], data["repaired"]["mended"]) == (0, (), ())
    assert held(tmp_path) == before
    with Journal.open(tmp_path) as journal:
        assert journal.look_up([key_of(3)])[key_of(3)].max_tokens == 64


def test_damaged_numbers_are_not_signed_anew_and_repair_counts_them_again(tmp_path):
    make(tmp_path)
    changed(tmp_path, "UPDATE meta SET value = '1' WHERE name = 'last_shard'")
    with Journal.open(tmp_path) as journal, pytest.raises(StoreCorrupt, match="meta"):
        journal.apply([intent(40, attempt_id=400)])
    assert [finding.place for finding in verify_journal(tmp_path)] == ["journal.db meta"]
    assert verified(tmp_path, repair=True)[1] == 0
    with Journal.open(tmp_path) as journal:
        assert journal.next_shard() == 3


@pytest.mark.parametrize(
    ("statement", "act"),
    [
        ("runs SET config_json = '[]'", lambda journal: journal.begin_run(run_record("run-2"))),
        ("runs SET started_us = 0", lambda journal: journal.end_run("run-1", "complete", 0, 1.0)),
        ("counters SET value = 99 WHERE name = 'answers'", lambda journal: journal.apply([intent(5)])),
        (
            "intents SET reserved_tokens = 1",
            lambda journal: journal.apply([Failure(5, key_of(4), "timeout", None, b"", True, 1.0)]),
        ),
    ],
)
def test_what_is_counted_or_ended_again_was_whole_before(tmp_path, statement, act):
    with open_store(tmp_path) as journal:
        fill(journal, [0, 1])
        journal.apply([intent(4)])
        changed(tmp_path, f"UPDATE {statement}")
        with pytest.raises(StoreCorrupt):
            act(journal)
    assert verify_journal(tmp_path)


# --- files that wear a number no shard has had --------------------------------------------------------


def test_a_purge_after_a_kill_between_rename_and_commit_leaves_no_trace_and_no_twin(tmp_path, cut_short):
    make(tmp_path, parts=1, unsealed=5)
    cut_short(tmp_path, "shards.after_rename")
    assert Corpus.open(tmp_path).verify() == []
    assert purge.purge_store(tmp_path, None, "p7") == 1
    assert plain(tmp_path) == held(tmp_path) == hexes(0, 1, 2, 3, 4, 5, 6, 8, 9)
    assert purge.purge_store(tmp_path, key_of(2).hex(), None) == 1
    assert plain(tmp_path) == held(tmp_path) == hexes(0, 1, 3, 4, 5, 6, 8, 9)
    assert Corpus.open(tmp_path).verify() == []


def test_a_purge_goes_on_from_a_kill_in_a_merge(tmp_path, cut_short):
    make(tmp_path, parts=4)
    cut_short(tmp_path, "compaction.after_exchange")
    assert Corpus.open(tmp_path).verify() == []
    assert purge.purge_store(tmp_path, None, "p7") == 1
    assert plain(tmp_path) == held(tmp_path) == hexes(*(n for n in range(20) if n != 7))
    assert Corpus.open(tmp_path).verify() == []


def strange(store: Path, kind: str) -> Path:
    """A whole file under the next shard's number: of another store, or not even of our columns."""
    other = store.with_name("other")
    if kind == "same prompts":
        with open_store(other) as journal:
            journal.apply([answer(n, raw=raw_of(n, content="theirs")) for n in range(10, 15)])
            seal(journal, other, target_bytes=MIB, everything=True)
        (made,) = sealed(other)
    elif kind == "other prompts":
        make(other, parts=1, first=100)
        (made,) = sealed(other)
    else:
        made = store.with_name("made.parquet")
        pq.write_table(pa.table({"a": [1]}), made)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    path = store / "shards" / f"part-00000003-{digest[:16]}.parquet"
    shutil.copy(made, path)
    return path


@pytest.mark.parametrize("kind", ["same prompts", "other prompts", "no columns of ours"])
def test_a_strangers_file_under_the_next_number_is_named_refused_and_quarantined(tmp_path, kind):
    store = tmp_path / "store"
    make(store, unsealed=5)
    before, path = held(store), strange(store, kind)
    assert verified(store, repair=False)[0]["findings"] == [
        f"foreign: shards/{path.name}: no manifest row names it"
    ]
    for act in (
        lambda journal: seal(journal, store, target_bytes=MIB, everything=True),
        lambda journal: purge.purge(journal, store, {key_of(0)}),
        lambda journal: finish_interrupted(journal, store),
    ):
        with Journal.open(store) as journal, pytest.raises(StoreCorrupt, match=path.name):
            act(journal)
    data, left = verified(store, repair=True)
    assert (left, data["repaired"]["quarantined"], data["repaired"]["lost"]) == (0, (path.name,), ())
    assert (store / "quarantine" / path.name).exists()
    assert held(store) == before
    with Journal.open(store) as journal:
        assert seal(journal, store, target_bytes=MIB, everything=True).rows == 5


def test_strangers_of_one_name_lie_side_by_side_in_quarantine(tmp_path):
    make(tmp_path, parts=1)
    folder = tmp_path / "shards"
    for content in (b"one", b"two"):
        (folder / "notes.parquet").write_bytes(content)
        (folder / "odd").mkdir()
        (folder / "odd" / "file").write_bytes(content)
        assert verified(tmp_path, repair=True)[1] == 0
    quarantined = {path.name: path for path in (tmp_path / "quarantine").iterdir()}
    assert set(quarantined) == {"notes.parquet", "notes~1.parquet", "odd", "odd~1"}
    assert (
        quarantined["notes~1.parquet"].read_bytes() == (quarantined["odd~1"] / "file").read_bytes() == b"two"
    )


# --- doors ---------------------------------------------------------------------------------------------


def test_repair_seals_nothing_that_the_terms_forbid(tmp_path):
    store = tmp_path / "store"
    make(store, parts=0, unsealed=3)
    with pytest.raises(TermsRefused):
        seal_task.seal_now(store)
    verify_with_bill(store, repair=True)
    assert sealed(store) == []
    assert held(store) == hexes(0, 1, 2)


@pytest.mark.parametrize("place", ["bare", "store/shards"])
def test_a_folder_without_a_journal_does_not_become_a_store_by_sealing(tmp_path, place):
    make(tmp_path / "store", parts=1)
    shutil.copytree(tmp_path / "store" / "shards", tmp_path / "bare" / "shards")
    folder = tmp_path / place
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(StoreError, match="no journal"):
        seal_task.seal_now(folder)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_merge_keeps_the_mode_of_the_folder(tmp_path):
    make(tmp_path, parts=4)
    (tmp_path / "shards").chmod(0o755)
    with Journal.open(tmp_path) as journal:
        assert list(compact.compact_steps(journal, tmp_path, target_bytes=MIB))
    assert (tmp_path / "shards").stat().st_mode & 0o777 == 0o755


def test_a_purge_says_when_a_reader_keeps_the_old_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(purge, "_PATIENCE_S", 0.0)
    make(tmp_path, parts=0, unsealed=3)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM answers").fetchone() == (3,)
        with Journal.open(tmp_path) as journal:
            with journal.reading() as connection:
                connection.execute("PRAGMA busy_timeout=50")
            with StoreLock(tmp_path, started_at=0.0), pytest.raises(StoreError, match="old pages"):
                purge.purge(journal, tmp_path, {key_of(1)})
    Journal.open(tmp_path).close()
    assert held(tmp_path) == hexes(0, 2)
    assert not any(raw_of(1) in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_verify_beside_a_writer_reads_rows_and_their_sum_at_one_instant(tmp_path, monkeypatch):
    make(tmp_path, parts=0, unsealed=1)
    real, commits = checksums.matches_checksum, []
    with Journal.open(tmp_path) as journal:
        journal._run = 1

        def between(connection, name, check):
            if not commits:  # the writer signs through here as well
                commits.append(name)
                fill(journal, [100])
            return real(connection, name, check)

        monkeypatch.setattr(checksums, "matches_checksum", between)
        findings = verify_journal(tmp_path)
    assert commits
    assert findings == []

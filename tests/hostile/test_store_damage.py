"""Readers believe nothing on the disk that is not proved: rows left out are an error, never a count."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.api.types import Request
from harvester.cli.store import verify_lines
from harvester.errors import HarvesterError, StoreCorrupt, StoreError
from harvester.export.curate import CurateConfig, curate
from harvester.observe.report.answer_statistics import statistics_of_store
from harvester.observe.report.samples import search
from harvester.observe.status import current_status
from harvester.store.journal.batches import BatchRow, BatchState, StoredBatch, enter_batch
from harvester.store.journal.checksums import COVERED, changed_index_keys, changed_rows, checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import DeadLetter, Failure, SharedAnswer
from harvester.store.maintain.purge import purge_store
from harvester.store.maintain.repair import RepairResult, repair_store
from harvester.store.maintain.seal_task import seal_now
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.pauses import load
from harvester.store.reader import Corpus
from harvester.store.shards import proved
from harvester.store.shards.seal import seal
from tests.harvester.store_rows import answer, fill, intent, key_of, open_store, prompt_of, run_record
from tests.tiers import rest_is_slow

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that an earlier read of this process has proved are not looked at again."""
    monkeypatch.setattr(proved, "_proved", set())


def make(store: Path, sealed: int = 20, unsealed: int = 5) -> Path:
    with open_store(store) as journal:
        fill(journal, range(sealed))
        if sealed:
            seal(journal, store, target_bytes=MIB, everything=True)
        fill(journal, range(sealed, sealed + unsealed))
    proved._proved.clear()
    return store


def read_all(store: Path) -> int:
    return sum(1 for _ in Corpus.open(store).samples())


def curated(store: Path) -> int:
    out = store.parent / "curated"
    shutil.rmtree(out, ignore_errors=True)
    return curate(CurateConfig(corpus=store, out=out, filters=[])).kept


def found(store: Path) -> int:
    return len(search(store, "").samples)


READERS: dict[str, Callable[[Path], object]] = {
    "read": read_all,
    "curate": curated,
    "statistics": statistics_of_store,
    "search": found,
    "facts": lambda store: Corpus.open(store).distinct(["run_id"]),
    "lineages": lambda store: Corpus.open(store).lineages(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.98])
def test_a_changed_bit_of_a_shard_is_an_error_of_every_reader(
    reader: str, place: float, tmp_path: Path
) -> None:
    store = make(tmp_path / "store")
    READERS[reader](store)
    proved._proved.clear()
    (shard,) = (store / "shards").glob("*.parquet")
    damaged = bytearray(shard.read_bytes())
    damaged[int(place * len(damaged))] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(StoreCorrupt):
        READERS[reader](store)


def test_a_shard_with_fewer_rows_than_its_manifest_row_is_an_error(tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    (shard,) = (store / "shards").glob("*.parquet")
    pq.write_table(pq.read_table(shard).slice(0, 7), shard)
    with pytest.raises(StoreCorrupt):
        read_all(store)


@pytest.mark.parametrize("place", rest_is_slow([0.2, 0.5, 0.8], first=1))
def test_rows_behind_a_damaged_byte_of_the_log_are_an_error_of_every_reader(
    place: float, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    journal = open_store(store)
    for number in range(40):
        fill(journal, [number])
    for name in ("journal.db", "journal.db-wal"):  # as a kill leaves them
        shutil.copy(store / name, tmp_path / name)
    journal.close()
    for name in ("journal.db", "journal.db-wal"):
        shutil.move(tmp_path / name, store / name)
    assert read_all(store) == 40
    log = store / "journal.db-wal"
    damaged = bytearray(log.read_bytes())
    damaged[int(place * len(damaged))] ^= 4
    log.write_bytes(damaged)
    os.utime(log, ns=(1, 1))
    for reader in (*READERS.values(), current_status, lambda store: Journal.open(store, read_only=True)):
        with pytest.raises(StoreCorrupt, match="commits lie behind"):
            reader(store)
    assert verify_with_bill(store, repair=False).findings
    assert not verify_with_bill(store, repair=True).findings
    assert 0 < read_all(store) < 40


@pytest.mark.parametrize(
    ("was", "now"),
    [('"mock":false', '"mock":true '), ('"train"', '"eval" '), ("mock-teacher", "sock-teacher")],
)
def test_a_changed_lineage_is_neither_read_nor_sealed(was: str, now: str, tmp_path: Path) -> None:
    store = make(tmp_path / "store", sealed=0)
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        (text,) = connection.execute("SELECT lineage_json FROM runs").fetchone()
        assert was in text
        connection.execute("UPDATE runs SET lineage_json = ?", (text.replace(was, now),))
    for reader in (read_all, READERS["lineages"], READERS["facts"]):
        with pytest.raises(StoreCorrupt):
            reader(store)
    with Journal.open(store) as journal, pytest.raises(StoreCorrupt):
        seal(journal, store, target_bytes=MIB, everything=True)
    assert not list((store / "shards").glob("*.parquet"))


def test_a_changed_key_is_named_at_the_start_and_repaired_for_good(tmp_path: Path) -> None:
    store = make(tmp_path / "store", sealed=13, unsealed=0)
    key = key_of(8)
    other = bytes([key[0] ^ 1]) + key[1:]
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        assert connection.execute("UPDATE keys SET key = ? WHERE key = ?", (other, key)).rowcount == 1
    with Journal.open(store, read_only=True) as journal, pytest.raises(StoreCorrupt):
        journal.require_whole_index()
    repair_store(store)
    assert not verify_with_bill(store, repair=False).findings
    with Journal.open(store, read_only=True) as journal:
        journal.require_whole_index()
        assert len(journal.look_up([key_of(number) for number in range(13)])) == 13


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_key_that_was_paid_twice_is_left_once_by_one_repair(is_sealed: bool, tmp_path: Path) -> None:
    store = make(tmp_path / "store", sealed=13, unsealed=0)
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        assert connection.execute("DELETE FROM keys WHERE key = ?", (key_of(8),)).rowcount == 1
    with Journal.open(store) as journal:
        journal.begin_run(run_record("run-2"))
        fill(journal, [8])
        if is_sealed:
            seal(journal, store, target_bytes=MIB, everything=True)
    for _ in range(2):
        repair_store(store)
        assert not verify_with_bill(store, repair=False).findings
    keys = [sample.key for sample in Corpus.open(store).samples(["key"])]
    assert sorted(keys) == sorted(key_of(number).hex() for number in range(13))


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END",
        "CREATE VIEW w AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x FROM r) SELECT x FROM r",
        "CREATE TABLE foreign_table (x)",
        "CREATE INDEX i ON answers (raw)",
        "DROP TABLE finished; CREATE VIEW finished AS SELECT 1",
    ],
    ids=["trigger", "view", "table", "index", "view in place of a table"],
)
def test_anything_in_the_journal_that_is_not_ours_is_refused(statement: str, tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    with closing(sqlite3.connect(store / "journal.db")) as connection:
        connection.executescript(statement.removeprefix("DROP TABLE finished; "))
    for reader in (*READERS.values(), current_status, Journal.open, seal_now):
        with pytest.raises(StoreCorrupt, match="did not make"):
            reader(store)
    assert verify_with_bill(store, repair=False).findings


def findings(store: Path) -> object:
    return verify_with_bill(store, repair=False).findings


CRAFTED: dict[str, tuple[str, str, object]] = {
    "prompt is no object": ("answers", "prompt_json", "[]"),
    "prompt is no JSON": ("answers", "prompt_json", "{"),
    "request is a number": ("answers", "body_json", "5"),
    "request is nested": ("answers", "body_json", "[" * 5000),
    "raw is text": ("answers", "raw", "text"),
    "time out of range": ("answers", "at_us", 1 << 62),
    "no such outcome": ("answers", "outcome", 99),
    "no such run": ("answers", "run", 99),
    "tokens are text": ("answers", "input_tokens", "many"),
    "lineage is a list": ("runs", "lineage_json", "[]"),
    "lineage is no JSON": ("runs", "lineage_json", "{"),
    "shard is text": ("manifest", "shard", 1),
    "name leads elsewhere": ("manifest", "name", "../journal.db"),
    "rows are text": ("manifest", "rows", "x"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_a_crafted_row_with_a_right_checksum_gives_an_error_in_words(kind: str, tmp_path: Path) -> None:
    table, column, value = CRAFTED[kind]
    store = make(tmp_path / "store")
    columns, short = COVERED[table]
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        row = list(connection.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchone())
        row[columns.index(column)] = value
        rest = [item.encode() if isinstance(item, str) else item for item in row[short:]]
        connection.execute(
            f"UPDATE {table} SET {column} = ?, checksum = ? WHERE rowid = (SELECT min(rowid) FROM {table})",
            (value, checksum(row[:short], *rest)),
        )
    for reader in (
        *READERS.values(),
        current_status,
        seal_now,
        lambda store: verify_with_bill(store, repair=False),
    ):
        try:
            reader(store)
        except HarvesterError:
            continue


PAUSES = ["{}", "[]", "5", '{"why": 5, "at": "x", "teacher_id": 1}', "[" * 5000, "\x00"]


@pytest.mark.parametrize("value", PAUSES, ids=range(len(PAUSES)))
def test_a_crafted_pause_is_an_error_in_words(value: str, tmp_path: Path) -> None:
    store = make(tmp_path / "store")
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        connection.execute("INSERT INTO meta VALUES ('hold:operator', ?)", (value,))
    with Journal.open(store, read_only=True) as journal, pytest.raises(StoreCorrupt):
        load(journal)


def test_a_file_that_ends_arrow_is_decoded_in_a_child_first(tmp_path: Path) -> None:
    store = make(tmp_path / "store", unsealed=0)
    folder = tmp_path / "copy"
    folder.mkdir()
    (shard,) = (store / "shards").glob("*.parquet")
    whole = shard.read_bytes()
    errors = 0
    for place in range(8, len(whole), max(1, len(whole) // 12)):
        proved._proved.clear()
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        (folder / "x.parquet").write_bytes(damaged)
        try:
            read_all(folder)
        except (StoreError, StoreCorrupt):
            errors += 1
    assert errors > 3
    (folder / "x.parquet").write_bytes(whole)
    assert read_all(folder) == 20


FOREIGN: dict[str, Callable[[pa.Table], pa.Table]] = {
    "null keys": lambda table: _with(table, "key", pa.nulls(20, pa.string())),
    "keys are numbers": lambda table: _with(table, "key", pa.array(range(20))),
    "keys are no hex": lambda table: _with(table, "key", pa.array(["x"] * 20)),
    "null messages": lambda table: _with(
        table, "messages", pa.nulls(20, table.schema.field("messages").type)
    ),
    "messages are text": lambda table: _with(table, "messages", pa.array(["x"] * 20)),
    "times out of range": lambda table: _with(
        table, "created_at", pa.array([1 << 62] * 20, pa.timestamp("us", tz="UTC"))
    ),
    "request is no JSON": lambda table: _with(table, "request_json", pa.array(["{"] * 20)),
    "outcome is missing": lambda table: table.drop_columns(["outcome"]),
    "a column twice": lambda table: table.append_column("key", table["key"]),
    "a column too many": lambda table: table.append_column("more", table["key"]),
}


def _with(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_shard_of_other_columns_or_values_is_an_error_in_words(kind: str, tmp_path: Path) -> None:
    store = make(tmp_path / "store", unsealed=0)
    folder = tmp_path / "copy"
    folder.mkdir()
    (shard,) = (store / "shards").glob("*.parquet")
    pq.write_table(FOREIGN[kind](pq.ParquetFile(shard).read()), folder / "x.parquet")
    for reader in (*READERS.values(), findings):
        try:
            reader(folder)
        except HarvesterError:
            continue


TABLES: dict[str, tuple[str, str]] = {
    "runs": ("UPDATE runs SET config_json = '[]'", "UPDATE runs SET ending = 'b' || substr(ending, 2)"),
    "dead": ("UPDATE dead SET message = 'other words'", "UPDATE dead SET code = 'q' || substr(code, 2)"),
    "asks": ("UPDATE asks SET prompt_json = '{}'", "UPDATE asks SET sample_index = sample_index + 4"),
    "failures": ("UPDATE failures SET raw = x'00'", "UPDATE failures SET status = status + 8"),
    "intents": (
        "UPDATE intents SET reserved_tokens = 77777",
        "UPDATE intents SET reserved_tokens = reserved_tokens + 4",
    ),
    "batches": (
        "UPDATE batches SET name = 'another'",
        "UPDATE batches SET rows = rows + 4",
    ),
    "batch_rows": (
        "UPDATE batch_rows SET body_json = '{}'",
        "UPDATE batch_rows SET reserved_tokens = reserved_tokens + 4",
    ),
    "manifest": ("UPDATE manifest SET rows = 7", "UPDATE manifest SET rows = rows + 1"),
    "keys": ("UPDATE keys SET outcome = 7, asker = x'00'", "UPDATE keys SET max_tokens = 65"),
    "answers": ("UPDATE answers SET raw = x'00'", "UPDATE answers SET attempts = attempts - 1"),
    "counters": ("", "UPDATE counters SET value = (value | 64) - (value & 64) WHERE name = 'output_tokens'"),
    "meta": (
        "UPDATE meta SET value = '99' WHERE name = 'last_shard'",
        "UPDATE meta SET value = '0' WHERE name = 'last_shard'",
    ),
    "checks": ("", "UPDATE checks SET checksum = (checksum | 8) - (checksum & 8) WHERE name = 'meta'"),
}


def make_all_tables(store: Path) -> Path:
    """A store with a row in every table."""
    with open_store(store) as journal:
        fill(journal, range(20))
        seal(journal, store, target_bytes=MIB, everything=True)
        fill(journal, range(20, 25))
        prompt, body = prompt_of(30), answer(30).body
        journal.apply([intent(40), SharedAnswer(key_of(3), prompt_of(31), 0)])
        journal.apply(
            [
                DeadLetter(key_of(30), prompt, 0, body, "prompt_rejected", "no", 1, 0.0),
                Failure(intent(40).attempt_id, key_of(40), "timeout", 500, b"x", True, 1.0),
            ]
        )
        journal.end_run("run-1", "complete", 0, 5.0)
        batch = StoredBatch(
            0, 0, "b", BatchState.CREATED, "in_progress", 1.0, 1, False, "f", "b1", "http://t"
        )
        request = Request(key_of(9000), prompt_of(9000), {"messages": []})
        enter_batch(journal, batch, [BatchRow(request, 0, 99, 1, (8, 2))])
    proved._proved.clear()
    return store


def dump(store: Path) -> dict[str, list[tuple[object, ...]]]:
    with closing(sqlite3.connect(store / "journal.db")) as connection:
        return {
            table: connection.execute(f"SELECT * FROM {table}").fetchall()
            for table in (*COVERED, *OTHERS)
            if table != "finished"
        }


OTHERS = ("counters", "meta", "checks")
BATCH_TABLES = ("batches", "batch_rows")


@pytest.mark.parametrize("table", TABLES)
def test_a_flipped_bit_in_any_table_is_named_and_put_back(table: str, tmp_path: Path) -> None:
    store = make_all_tables(tmp_path / "store")
    before = dump(store)
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        statement = TABLES[table][1]
        row = "" if " WHERE " in statement else f" WHERE rowid = (SELECT min(rowid) FROM {table})"
        if table in {"keys", "dead"}:
            row = f" WHERE key = (SELECT min(key) FROM {table})"
        assert connection.execute(statement + row).rowcount == 1
    assert dump(store) != before
    assert verify_with_bill(store, repair=False).findings
    report = verify_with_bill(store, repair=True)
    assert (report.findings, report.repaired.mended) == ((), ("1 rows of journal.db",))
    assert (report.repaired.lost, report.repaired.notes) == ((), ())
    assert dump(store) == before


@pytest.mark.parametrize("table", [name for name, (statement, _) in TABLES.items() if statement])
def test_more_damage_in_any_table_reaches_a_clean_state_that_says_what_is_lost(
    table: str, tmp_path: Path
) -> None:
    store = make_all_tables(tmp_path / "store")
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        assert connection.execute(TABLES[table][0]).rowcount
    assert verify_with_bill(store, repair=False).findings
    report = verify_with_bill(store, repair=True)
    assert report.findings == ()
    done = report.repaired
    lost = {"answers": {key_of(n).hex() for n in range(20, 25)}, "dead": {key_of(30).hex()}}
    assert set(done.lost) == lost.get(table, set())
    assert bool(done.notes) == (
        table in {"runs", "dead", "asks", "failures", "intents", "meta", *BATCH_TABLES}
    )
    assert read_all(store) == 26 - 5 * (table == "answers") - (table == "asks")
    assert verify_with_bill(store, repair=True).repaired == RepairResult((), 0, ())


def test_sums_that_nothing_proves_stay_named(tmp_path: Path) -> None:
    store = make_all_tables(tmp_path / "store")
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        connection.execute("UPDATE counters SET value = 77 WHERE name = 'output_tokens'")
    for _ in range(2):
        report = verify_with_bill(store, repair=True)
        assert [finding.place for finding in report.findings] == ["journal.db counters:1"]
    assert "restore journal.db from a backup" in report.remedy
    assert read_all(store) == 26


@pytest.mark.parametrize(
    "table", rest_is_slow(["answers", "keys", "sqlite_autoindex_answers_1", "runs", "dead"], first=3)
)
def test_a_journal_with_a_damaged_page_is_rebuilt_from_what_can_be_read(table: str, tmp_path: Path) -> None:
    store = make_all_tables(tmp_path / "store")
    with Journal.open(store) as journal:
        journal.begin_run(run_record("run-2"))
        fill(journal, range(50, 250))
    with closing(sqlite3.connect(store / "journal.db")) as connection:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        (page,) = connection.execute(query, (table,)).fetchone()
    damaged = bytearray((store / "journal.db").read_bytes())
    damaged[(page - 1) * 4096 : (page - 1) * 4096 + 64] = b"\xff" * 64
    (store / "journal.db").write_bytes(damaged)
    assert verify_with_bill(store, repair=False).findings
    report = verify_with_bill(store, repair=True)
    assert report.findings == ()
    assert "journal.db" in report.repaired.quarantined
    assert report.bill.billed == 225
    rows = read_all(store)
    if table in {"dead", "sqlite_autoindex_answers_1"}:
        assert rows == 226
    elif table == "answers":
        assert rows == 21
        assert "205 more answers are lost" in report.repaired.notes[-1]
    with Journal.open(store) as journal:
        journal.begin_run(run_record("run-3"))
        fill(journal, range(300, 305))
        assert seal(journal, store, target_bytes=MIB, everything=True).rows >= 5


@pytest.mark.parametrize(
    "statement", ["DELETE FROM answers", "DELETE FROM answers WHERE id = (SELECT min(id) FROM answers)"]
)
def test_answers_that_were_paid_and_are_neither_stored_nor_purged_are_named(
    statement: str, tmp_path: Path
) -> None:
    store = make(tmp_path / "store")
    purge_store(store, key_of(2).hex(), None)
    purge_store(store, key_of(22).hex(), None)
    assert verify_with_bill(store, repair=False).findings == ()
    with closing(sqlite3.connect(store / "journal.db")) as connection, connection:
        gone = connection.execute(statement).rowcount
    (finding,) = verify_with_bill(store, repair=False).findings
    assert f"{gone} answers were paid" in finding.message
    assert verify_with_bill(store, repair=True).findings == ()


def test_one_changed_byte_of_a_page_costs_no_row(tmp_path: Path) -> None:
    store = make(tmp_path / "store", sealed=140, unsealed=0)
    (shard,) = (store / "shards").glob("*.parquet")
    whole = shard.read_bytes()
    with pq.ParquetFile(shard) as file:
        columns = [file.metadata.row_group(0).column(number) for number in range(0, 40, 19)]
    for column in columns:
        start = column.dictionary_page_offset or column.data_page_offset
        damaged = bytearray(whole)
        damaged[start + column.total_compressed_size - 3] ^= 0x5A
        shard.write_bytes(damaged)
        report = verify_with_bill(store, repair=True)
        assert (report.findings, report.repaired.mended) == ((), (shard.name,))
        assert shard.read_bytes() == whole
    assert read_all(store) == 140


@pytest.mark.parametrize("how", ["gone", "no database"])
def test_without_a_journal_the_rows_of_shards_are_counted(how: str, tmp_path: Path) -> None:
    store = make(tmp_path / "store", unsealed=0)
    (store / "LOCK").touch()
    for path in store.glob("journal.db*"):
        path.unlink()
    if how == "no database":
        (store / "journal.db").write_bytes(b"x" * 5000)
    report = verify_with_bill(store, repair=False)
    assert (report.answers, report.has_journal, len(report.findings)) == (20, False, 1)
    text = " ".join(verify_lines(store, report))
    assert "at least 20 answers" in text
    assert "billed for" not in text
    assert "copy" in report.remedy


@pytest.mark.parametrize(
    ("name", "saved"),
    rest_is_slow([("completion", 140), ("latency_s", 0), ("messages", 140), ("outcome", 140)], first=2),
)
def test_rows_are_saved_whose_damaged_columns_are_derived_again(
    name: str, saved: int, tmp_path: Path
) -> None:
    store = make(tmp_path / "store", sealed=140, unsealed=0)
    before = list(Corpus.open(store).samples())
    (shard,) = (store / "shards").glob("*.parquet")
    with pq.ParquetFile(shard) as file:
        group = file.metadata.row_group(0)
        chunks = [group.column(number) for number in range(group.num_columns)]
    damaged = bytearray(shard.read_bytes())
    for chunk in chunks:
        if chunk.path_in_schema.partition(".")[0] == name:
            end = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
            damaged[end - 5 : end] = bytes(byte ^ 0x33 for byte in damaged[end - 5 : end])
    shard.write_bytes(damaged)
    report = verify_with_bill(store, repair=True)
    assert (report.findings, report.repaired.saved) == ((), saved)
    assert len(report.repaired.lost) == 140 - saved
    proved._proved.clear()
    assert list(Corpus.open(store).samples()) == before[:saved]


def test_every_kind_of_change_of_an_index_row_is_found_at_the_start(tmp_path: Path) -> None:
    store = make(tmp_path / "store", unsealed=0)
    changes = [
        "key = CAST(key AS TEXT)",
        "key = 5",
        "asker = CAST(asker AS TEXT)",
        "asker = 7",
        "shard = 2",
        "outcome = 'x'",
        "max_tokens = NULL",
        "max_tokens = 64.5",
        "checksum = checksum + 1",
        "checksum = 'x'",
    ]
    with closing(sqlite3.connect(store / "journal.db", isolation_level=None)) as connection:
        for change in changes:
            connection.execute("BEGIN")
            connection.execute(f"UPDATE keys SET {change} WHERE key = (SELECT max(key) FROM keys)")
            connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
            assert len(list(changed_index_keys(connection))) == 1, change
            assert len(list(changed_rows(connection, "keys"))) == 1, change
            connection.execute("ROLLBACK")
        assert list(changed_index_keys(connection)) == []


@pytest.mark.parametrize(
    ("kind", "finding"), [("null keys", "key"), ("outcome is missing", "outcome"), ("a column twice", "key")]
)
def test_wrong_columns_of_a_bare_folder_are_named_by_verify_and_readers(
    kind: str, finding: str, tmp_path: Path
) -> None:
    store = make(tmp_path / "store", unsealed=0)
    folder = tmp_path / "copy"
    folder.mkdir()
    (shard,) = (store / "shards").glob("*.parquet")
    pq.write_table(FOREIGN[kind](pq.ParquetFile(shard).read()), folder / "x.parquet")
    found_faults = verify_with_bill(folder, repair=False).findings
    assert [finding in fault.message for fault in found_faults] == [True]
    with pytest.raises(StoreError, match=finding):
        read_all(folder)


def test_a_fifo_in_the_place_of_a_shard_is_moved_away_by_a_repair(tmp_path: Path) -> None:
    store = make(tmp_path / "store", unsealed=0)
    (shard,) = (store / "shards").glob("*.parquet")
    shard.unlink()
    os.mkfifo(shard)
    named = f"foreign: shards/{shard.name}: it is no regular file"
    assert [str(finding) for finding in verify_with_bill(store, repair=False).findings] == [named]
    report = verify_with_bill(store, repair=True)
    assert (report.findings, len(report.repaired.lost)) == ((), 20)

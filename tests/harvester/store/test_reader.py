"""Test the reader: columns, unsealed rows, shared answers, reading beside a writer, every kind of damage."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harvester.errors import HarvesterError, StoreCorrupt, StoreError, StoreFormatError
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import DeadLetter, Failure, SharedAnswer
from harvester.store.reader import Corpus
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA, VERSION_KEY, to_row, to_table
from harvester.store.shards.seal import seal
from harvester.terms.lineage import Lineage
from tests.harvester.store_rows import (
    AT,
    answer,
    fill,
    intent,
    key_of,
    open_store,
    prompt_of,
)

MIB = 1024 * 1024


def make(store: Path, *, sealed: int = 20, tail: int = 10) -> None:
    with open_store(store) as journal:
        fill(journal, range(sealed))
        seal(journal, store, target_bytes=MIB, everything=True)
        fill(journal, range(sealed, sealed + tail))


def ids(store: Path, **options: object) -> list[str]:
    return sorted(sample.prompt_id for sample in Corpus.open(store).samples(**options))


def test_sealed_rows_and_the_tail_read_alike(tmp_path):
    make(tmp_path)
    corpus = Corpus.open(tmp_path)
    samples = {sample.key: sample for sample in corpus.samples()}
    assert corpus.count() == len(samples) == 30
    assert ids(tmp_path, include_unsealed=False) == sorted(f"p{n}" for n in range(20))
    for number in (3, 25):
        entry = samples[key_of(number).hex()]
        assert (entry.completion, entry.prompt_id, entry.outcome) == (str(number + 1), f"p{number}", "ok")
        assert entry.metadata == {"task": "sum", "split": "train"}
        assert [message["role"] for message in entry.messages] == ["system", "user"]
    with open_store(tmp_path, run_id="run-2") as journal:
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    assert {sample.key: sample for sample in Corpus.open(tmp_path).samples()} == samples


def test_batches_hold_what_the_samples_do(tmp_path):
    make(tmp_path, tail=20)
    corpus = Corpus.open(tmp_path)
    columns = ["key", "completion", "logprobs"]
    rows = [row for batch in corpus.batches(columns) for row in batch.to_pylist()]
    assert all(list(row) == columns for row in rows)
    wanted = {sample.key: sample.completion for sample in corpus.samples()}
    assert len(rows) == len(wanted) == 40
    assert {row["key"]: row["completion"] for row in rows} == wanted


def test_columns_are_projected_and_unknown_ones_refused(tmp_path):
    make(tmp_path)
    for sample in Corpus.open(tmp_path).samples(columns=["completion", "outcome"]):
        assert sample.completion
        assert (sample.key, sample.raw, sample.prompt_id) == ("", b"", "")
    with pytest.raises(KeyError, match="colour"):
        next(Corpus.open(tmp_path).samples(columns=["colour"]))


def test_prompts_that_share_an_answer_each_get_a_sample(tmp_path):
    make(tmp_path)
    with open_store(tmp_path, run_id="run-2") as journal:
        for number in (3, 25):  # one sealed, one in the tail
            journal.apply(
                [
                    SharedAnswer(key_of(number), prompt_of(number, id=f"twin{number}", reference="?"), 1),
                    SharedAnswer(key_of(number), prompt_of(number, metadata={"split": "old"}), 0),
                    SharedAnswer(
                        key_of(number), prompt_of(number, metadata={"split": "held_out"}, line=99), 0
                    ),
                ]
            )
    corpus = Corpus.open(tmp_path)
    assert corpus.count() == 30
    samples = list(corpus.samples())
    assert len(samples) == 32
    for number in (3, 25):
        mine = sorted((s for s in samples if s.key == key_of(number).hex()), key=lambda s: s.prompt_id)
        assert [(s.prompt_id, s.sample_index, s.reference) for s in mine] == [
            (f"p{number}", 0, str(number + 1)),
            (f"twin{number}", 1, "?"),
        ]
        assert mine[0].metadata == {"split": "held_out"}  # the newest metadata of a row wins
        assert mine[0].source_line == 99
        assert {s.completion for s in mine} == {str(number + 1)}
    narrow = list(corpus.samples(columns=["completion", "metadata_json"]))
    assert len(narrow) == 32
    assert sum("held_out" in s.metadata_json for s in narrow) == 2
    assert {s.key for s in narrow} == {""}


def test_a_copied_folder_of_shards_is_a_corpus(tmp_path):
    make(tmp_path / "store")
    shutil.copytree(tmp_path / "store" / "shards", tmp_path / "copy" / "shards")
    for place in (tmp_path / "copy", tmp_path / "copy" / "shards"):
        corpus = Corpus.open(place)
        assert (corpus.count(), len(list(corpus.samples()))) == (20, 20)
        assert [lineage.run_id for lineage in corpus.lineages()] == ["run-1"]
        assert corpus.verify() == []


def test_a_curated_folder_with_one_lineage_a_file_reads_too(tmp_path):
    make(tmp_path / "store", tail=0)
    samples = list(Corpus.open(tmp_path / "store").samples())
    schema = SCHEMA.with_metadata({**SCHEMA.metadata, LINEAGE_KEY: b'{"run_id": "run-1"}'})
    pq.write_table(to_table(samples).cast(schema), tmp_path / "curated.parquet")
    corpus = Corpus.open(tmp_path)
    assert list(corpus.samples()) == samples
    assert corpus.lineages() == [Lineage({"run_id": "run-1"})]


@pytest.mark.parametrize(("version", "advice"), [(b"2", "newer release"), (b"0", "wrote it")])
def test_a_shard_of_another_version_is_refused_with_advice(tmp_path, version, advice):
    make(tmp_path / "store", tail=0)
    samples = list(Corpus.open(tmp_path / "store").samples())
    schema = SCHEMA.with_metadata({VERSION_KEY: version})
    pq.write_table(to_table(samples).cast(schema), tmp_path / "other.parquet")
    with pytest.raises(StoreFormatError, match=advice):
        list(Corpus.open(tmp_path).samples())


def test_a_folder_without_answers_is_reported(tmp_path):
    with pytest.raises(StoreError, match="no answers are stored here"):
        Corpus.open(tmp_path)


def test_an_empty_store_has_no_samples_and_nothing_wrong(tmp_path):
    open_store(tmp_path).close()
    corpus = Corpus.open(tmp_path)
    assert (list(corpus.samples()), corpus.count(), corpus.verify(), corpus.lineages()) == ([], 0, [], [])


def test_reading_leaves_every_byte_of_the_store_alone(tmp_path):
    make(tmp_path)
    journal = open_store(tmp_path, run_id="run-2")  # keeps a WAL alive
    fill(journal, range(100, 110))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith("-shm")}
    corpus = Corpus.open(tmp_path)
    assert len(list(corpus.samples())) == 40
    assert corpus.verify() == []
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith("-shm")}
    assert after == before
    journal.close()


def test_a_read_only_copy_without_a_wal_can_be_read(tmp_path):
    make(tmp_path / "store")
    for path in (tmp_path / "store").rglob("*"):
        path.chmod(0o500 if path.is_dir() else 0o400)
    (tmp_path / "store").chmod(0o500)
    try:
        assert len(ids(tmp_path / "store")) == 30
    finally:
        (tmp_path / "store").chmod(0o700)
        (tmp_path / "store" / "shards").chmod(0o700)


@pytest.mark.slow
def test_readers_beside_a_writer_see_a_growing_set_without_holes_or_twins(tmp_path):
    writer = GroupCommit(open_store(tmp_path))
    finished = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for number in range(1200):
                writer.submit(answer(number), lambda _: None)
                if number % 40 == 39:
                    writer.call(lambda j: seal(j, tmp_path, target_bytes=1, everything=True)).result(60)
        except BaseException as error:
            failures.append(error)
        finally:
            finished.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen: set[str] = set()
    plain: set[str] = set()
    rounds = 0
    while rounds == 0 or not finished.is_set():
        rows = [sample.key for sample in Corpus.open(tmp_path).samples(["key"])]
        assert len(rows) == len(set(rows))
        assert seen <= set(rows)
        seen = set(rows)
        if (tmp_path / "shards").exists() and any((tmp_path / "shards").glob("*.parquet")):
            keys = pq.read_table(tmp_path / "shards", columns=["key"])["key"].to_pylist()
            assert len(keys) == len(set(keys))
            assert plain <= set(keys)
            plain = set(keys)
        rounds += 1
    thread.join()
    writer.close()
    assert failures == []
    assert len(ids(tmp_path)) == 1200


# --- damage -------------------------------------------------------------------------------------------


def kinds(store: Path) -> set[str]:
    return {finding.kind for finding in Corpus.open(store, is_damaged=True).verify()}


def shard_of(store: Path) -> Path:
    (path,) = (store / "shards").glob("*.parquet")
    return path


def test_a_missing_shard_is_named_and_reading_on_is_refused(tmp_path):
    make(tmp_path)
    name = shard_of(tmp_path).name
    shard_of(tmp_path).unlink()
    (finding,) = Corpus.open(tmp_path).verify()
    assert (finding.kind, finding.place) == ("missing", f"shards/{name}")
    assert "20" in finding.message
    with pytest.raises(StoreError, match=name):
        list(Corpus.open(tmp_path).samples())


def test_a_torn_shard_is_named(tmp_path):
    make(tmp_path)
    path = shard_of(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    assert kinds(tmp_path) == {"torn"}
    with pytest.raises(StoreCorrupt, match=path.name):
        list(Corpus.open(tmp_path).samples())


def test_a_foreign_file_is_named_unless_it_is_just_being_sealed(tmp_path):
    make(tmp_path)
    name = "part-00000002-0123456789abcdef.parquet"
    shutil.copy(shard_of(tmp_path), tmp_path / "shards" / name)
    (tmp_path / "shards" / ".part-00000010.tmp").write_bytes(b"half")
    (finding,) = Corpus.open(tmp_path).verify()
    assert (finding.kind, finding.place) == ("foreign", f"shards/{name}")
    assert len(ids(tmp_path)) == 30  # the manifest decides, not the folder
    with StoreLock(tmp_path, started_at=0.0):
        assert kinds(tmp_path) == set()
        (tmp_path / "shards" / name.replace("2-", "9-")).write_bytes(b"")
        assert kinds(tmp_path) == {"foreign"}
        (tmp_path / "shards" / name.replace("2-", "9-")).unlink()
    (tmp_path / "shards" / "notes.parquet").write_bytes(b"")
    assert kinds(tmp_path) == {"foreign"}


def test_a_lost_manifest_row_and_lost_keys_are_named(tmp_path):
    make(tmp_path)
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("DELETE FROM keys WHERE key = ?", (key_of(3),))
    connection.commit()
    assert kinds(tmp_path) == {"disagrees", "missing"}
    connection.execute("DELETE FROM manifest")
    connection.commit()
    connection.close()
    assert kinds(tmp_path) == {"foreign", "missing"}


TABLES = ("runs", "intents", "answers", "keys", "dead", "asks", "failures", "manifest")


@pytest.mark.parametrize("table", TABLES)
def test_a_changed_row_of_any_table_is_named(tmp_path, table):
    make(tmp_path, sealed=3, tail=3)
    with open_store(tmp_path, run_id="run-2") as journal:
        journal.apply([intent(50, "run-2", 1050)])
        journal.apply(
            [
                SharedAnswer(key_of(1), prompt_of(1, id="twin"), 0),
                Failure(1050, key_of(50), "timeout", None, b"half", True, AT),
                DeadLetter(key_of(60), prompt_of(60), 0, answer(60).body, "prompt_rejected", "no", 1, AT),
            ]
        )
    assert kinds(tmp_path) == set()
    connection = sqlite3.connect(tmp_path / "journal.db")
    names = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    assert rows
    silent = []
    for name in names:
        if name == "id":
            continue  # only an order; who holds which answer does not hang on it
        connection.execute("BEGIN")
        (value,) = connection.execute(f"SELECT {name} FROM {table} LIMIT 1").fetchone()
        other = another(value)
        connection.execute(f"UPDATE {table} SET {name} = ? WHERE {name} IS ? ", (other, value))
        connection.commit()
        if not kinds(tmp_path):
            silent.append(name)
        connection.execute(f"UPDATE {table} SET {name} = ? WHERE {name} IS ?", (value, other))
        connection.commit()
    connection.close()
    assert silent == []


def another(value: object) -> object:
    """A value of the same kind that occurs nowhere else."""
    if isinstance(value, bytes):
        return value[:-1] + b"\x01\x02"
    if isinstance(value, str):
        return value + "x"
    return 7 if value is None else value + 7


def test_a_changed_count_or_number_is_named(tmp_path):
    make(tmp_path)
    for change in ("meta SET value = '3' WHERE name = 'last_shard'", "counters SET value = value + 1"):
        connection = sqlite3.connect(tmp_path / "journal.db")
        connection.execute("BEGIN")
        connection.execute(f"UPDATE {change}")
        connection.execute("COMMIT")
        finding = [str(entry) for entry in Corpus.open(tmp_path).verify()]
        assert any(change.split()[0] in entry for entry in finding), finding
        connection.close()


FLIPS = 120


@pytest.mark.parametrize("where", ["shard", pytest.param("journal", marks=pytest.mark.slow)])
def test_flipped_bits_are_never_silent(tmp_path, where):
    """Each flip is named, or changes nothing that a reader can see (free space inside the database)."""
    make(tmp_path, sealed=20, tail=20)
    path = shard_of(tmp_path) if where == "shard" else tmp_path / "journal.db"
    content = path.read_bytes()
    before = everything(tmp_path)
    rng = random.Random(7)
    named = 0
    for _ in range(FLIPS):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        changed = bytearray(content)
        changed[place] ^= bit
        path.write_bytes(changed)
        findings = findings_or_error(tmp_path)
        named += bool(findings)
        assert findings or everything(tmp_path) == before, f"byte {place} bit {bit} was silent"
    assert named == FLIPS if where == "shard" else named > FLIPS // 8
    path.write_bytes(content)
    assert kinds(tmp_path) == set()


def findings_or_error(store: Path) -> list[str]:
    try:
        return [str(finding) for finding in Corpus.open(store).verify()]
    except HarvesterError as error:
        return [str(error)]


def everything(store: Path) -> str:
    """All that readers of the journal and the corpus can see."""
    corpus = Corpus.open(store)
    connection = sqlite3.connect(f"file:{store / 'journal.db'}?mode=ro", uri=True)
    try:
        tables = (*TABLES, "meta", "counters")
        rows = {table: connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables}
    finally:
        connection.close()
    return repr((rows, sorted(json.dumps(to_row(sample), default=str) for sample in corpus.samples())))


def test_a_view_read_part_by_part_gives_the_same_samples(tmp_path):
    make(tmp_path)
    columns = ["key", "prompt_id", "sample_index", "completion", "metadata_json"]

    def by_parts() -> tuple[list, tuple[str, str, int]]:
        corpus = Corpus.open(tmp_path)
        with corpus.view(columns) as view:
            samples = list(view.unsealed)
            for entry in view.manifest:
                parts = corpus.parts(entry, 8)
                assert sum(rows for _, rows in parts) == entry.rows
                for groups, _ in parts:
                    samples += corpus.part(entry, groups, columns, view.asks_sha256)
            return samples, (view.tail_sha256, view.asks_sha256, view.unsealed_rows)

    samples, (tail, asks, unsealed) = by_parts()
    assert samples == list(Corpus.open(tmp_path).samples(columns))
    assert (bool(tail), asks, unsealed) == (True, "", 10)
    with open_store(tmp_path, run_id="run-2") as journal:
        for number in (3, 25):  # one sealed, one in the tail
            journal.apply([SharedAnswer(key_of(number), prompt_of(number, id=f"twin{number}"), 1)])
    samples, (same_tail, asks, _) = by_parts()
    assert samples == list(Corpus.open(tmp_path).samples(columns))
    assert (same_tail == tail, bool(asks)) == (True, True)
    corpus = Corpus.open(tmp_path)
    with pytest.raises(StoreError, match="prompts were asked while the corpus was read"):
        list(corpus.part(corpus.manifest[0], range(1), columns))
    with open_store(tmp_path, run_id="run-3") as journal:
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    assert by_parts()[1] == ("", asks, 0)

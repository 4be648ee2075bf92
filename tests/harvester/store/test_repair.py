"""Test repair, purge and merge: only lost answers are asked again, purged ones leave no trace."""

from __future__ import annotations

import json
import random
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.api.replies import completion
from harvester.api.types import Completion, Outcome, Usage
from harvester.cli.store import verify_lines
from harvester.errors import ConfigError, HarvesterError, StoreLocked
from harvester.export.export import export
from harvester.observe.status import current_status, status_lines
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import StoreLock
from harvester.store.journal.records import Answer, DeadLetter, Failure, SharedAnswer
from harvester.store.maintain import purge
from harvester.store.maintain.rederive import rederive
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from harvester.store.shards import compact, mend_file, recover_rows
from harvester.store.shards.parquet_file import open_writer
from harvester.store.shards.schema import SCHEMA
from harvester.store.shards.seal import ROWS_PER_GROUP, seal
from harvester.store.where import Where
from tests.harvester import store_rows
from tests.harvester.store_rows import (
    AT,
    answer,
    fill,
    intent,
    key_of,
    open_store,
    prompt_of,
    raw_of,
    run_record,
    verified,
)

MIB = 1024 * 1024
ROOT = Path(__file__).resolve().parents[3]


def sealed(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("*.parquet"))


def make(store: Path, parts: int = 4, rows: int = 20) -> None:
    with open_store(store) as journal:
        for part in range(parts):
            fill(journal, range(part * rows, (part + 1) * rows))
            seal(journal, store, target_bytes=MIB, everything=True)


def rows_of(store: Path) -> dict[str, object]:
    samples = list(Corpus.open(store).samples())
    assert len(samples) == len({(s.key, s.prompt_id) for s in samples})
    return {s.key: s for s in samples}


def compacted(store: Path, target_bytes: int = MIB) -> None:
    with Journal.open(store) as journal:
        for _ in compact.compact_steps(journal, store, target_bytes=target_bytes):
            pass


def test_small_shards_become_one_with_the_same_rows_and_the_same_bytes_twice(tmp_path):
    digests = set()
    for name in ("a", "b"):
        store = tmp_path / name
        make(store)
        before = rows_of(store)
        compacted(store)
        (shard,) = sealed(store)
        digests.add(shard.name)
        assert rows_of(store) == before
        assert Corpus.open(store).verify() == []
        with Journal.open(store) as journal:
            assert set(journal.look_up([key_of(n) for n in range(90)])) == {key_of(n) for n in range(80)}
    assert len(digests) == 1


def test_shards_of_different_terms_and_large_ones_are_left_alone(tmp_path):
    make(tmp_path, parts=1)
    with open_store(tmp_path, run_id="run-2", purpose="eval") as journal:
        fill(journal, range(100, 120))
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    names = [path.name for path in sealed(tmp_path)]
    compacted(tmp_path)
    compacted(tmp_path, target_bytes=100)
    assert [path.name for path in sealed(tmp_path)] == names


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("compaction.before_exchange", marks=pytest.mark.slow),
        "compaction.after_exchange",
        pytest.param("compaction.before_commit", marks=pytest.mark.slow),
        pytest.param("compaction.after_commit", marks=pytest.mark.slow),
    ],
)
def test_a_kill_while_merging_loses_and_doubles_nothing(tmp_path, point):
    make(tmp_path)
    before = rows_of(tmp_path)
    code = (
        "import sys; from pathlib import Path; from harvester.store.shards import compact\n"
        "from harvester.store.journal.journal import Journal\n"
        "store = Path(sys.argv[1]); journal = Journal.open(store)\n"
        "list(compact.compact_steps(journal, store, target_bytes=1 << 20))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env={"HARVESTER_FAILPOINT": point}
    )
    assert done.returncode == -signal.SIGKILL
    assert rows_of(tmp_path) == before
    plain = pq.read_table(tmp_path / "shards")["key"].to_pylist()
    assert sorted(plain) == sorted(before)
    assert Corpus.open(tmp_path).verify() == []
    compacted(tmp_path)
    assert rows_of(tmp_path) == before
    assert len(sealed(tmp_path)) == 1
    assert Corpus.open(tmp_path).verify() == []
    assert pq.read_table(tmp_path / "shards").num_rows == 80


def test_answers_arrive_while_a_shard_is_written_in_slices(tmp_path):
    from harvester.store.shards.seal import seal_steps

    with open_store(tmp_path) as journal:
        fill(journal, range(1000))
        steps = seal_steps(journal, tmp_path, target_bytes=MIB, everything=True)
        slices = 0
        while next(steps, "end") is None:
            fill(journal, range(2000 + 2 * slices, 2002 + 2 * slices))
            slices += 1
        assert slices >= 4
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    assert len(rows_of(tmp_path)) == 1000 + 2 * slices
    assert Corpus.open(tmp_path).verify() == []


# --- purge --------------------------------------------------------------------------------------------


def traces(store: Path, text: bytes) -> list[str]:
    return [path.name for path in store.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_a_purged_key_leaves_journal_shards_corpus_and_every_byte(tmp_path):
    secret = "my-name-is-nobody"
    with open_store(tmp_path) as journal:
        prompt = prompt_of(3, metadata={"who": secret})
        body = {**answer(3).body, "messages": [{"role": "user", "content": secret}]}
        fill(journal, [0, 1, 2])
        journal.apply([answer(3, prompt=prompt, body=body)])
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
        journal.apply([answer(4, prompt=prompt_of(4, metadata={"who": secret}), body=body)])
        journal.apply([SharedAnswer(key_of(4), prompt_of(9, id="other", metadata={"who": secret}), 0)])
    assert traces(tmp_path, secret.encode()) or sealed(tmp_path)
    old = sealed(tmp_path)[0].name
    assert purge.purge_store(tmp_path, key_of(3).hex(), None) == 1
    assert purge.purge_store(tmp_path, None, "other") == 1
    with pytest.raises(ConfigError, match="no prompt 'other'"):
        purge.purge_store(tmp_path, None, "other")
    assert set(rows_of(tmp_path)) == {key_of(n).hex() for n in range(3)}
    assert traces(tmp_path, secret.encode()) == []
    assert old not in {path.name for path in sealed(tmp_path)}
    assert Corpus.open(tmp_path).verify() == []
    with Journal.open(tmp_path) as journal:
        assert journal.look_up([key_of(3), key_of(4)]) == {}


def test_a_purge_reaches_exports_quarantine_and_dead_letters(tmp_path):
    secret = b"my-name-is-nobody"
    store = tmp_path / "store"
    facts = {"model": "mock-teacher", "teacher_id": "http://127.0.0.1:8000/v1|mock-teacher", "mock": True}

    def answer(number: int, **changes: object) -> Answer:
        raw = raw_of(number).replace(b"mock-2026", b"mock-teacher")
        body = {"model": "mock-teacher", "messages": list(prompt_of(number).messages), "max_tokens": 64}
        return store_rows.answer(number, raw=raw, body=body, **changes)

    with open_store(store, **facts) as journal:
        prompt = prompt_of(3, reference=secret.decode())
        letter = DeadLetter(key_of(4), prompt, 0, answer(3).body, "prompt_rejected", secret.decode(), 1, 0.0)
        journal.apply([answer(0), answer(1), answer(3, prompt=prompt), letter])
        journal.write_dead_letters(store)
        seal(journal, store, target_bytes=MIB, everything=True)
    (path,) = sealed(store)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    verify_with_bill(store, repair=True)
    with open_store(store, run_id="run-2", **facts) as journal:
        journal.apply([answer(3, prompt=prompt), answer(0), answer(1)])
    assert traces(store, secret)
    assert list((store / "quarantine").iterdir())
    purge.purge_store(store, None, "p3")
    assert traces(store, secret) == []
    assert list((store / "quarantine").iterdir()) == []
    export(store, tmp_path / "out")
    assert traces(tmp_path / "out", secret) == []
    (exported,) = (tmp_path / "out").rglob("*.parquet")
    assert pq.read_table(exported).num_rows == 2


def test_the_last_row_of_a_shard_takes_the_file_with_it(tmp_path):
    make(tmp_path, parts=1, rows=1)
    purge.purge_store(tmp_path, None, "p0")
    assert sealed(tmp_path) == []
    assert Corpus.open(tmp_path).count() == 0


def test_purge_wants_exactly_one_name_and_the_store_for_itself(tmp_path):
    make(tmp_path, parts=1)
    nobody = key_of(900).hex()
    for key, prompt in (
        (None, None),
        ("00", "p1"),
        ("xyz", None),
        ("abcd", None),
        (nobody, None),
        (None, "p900"),
    ):
        with pytest.raises(ConfigError):
            purge.purge_store(tmp_path, key, prompt)
    for where in ("", "not = {}", 'file = "none"'):  # neither everything nor nothing
        with pytest.raises(ConfigError):
            purge.purge_store(tmp_path, None, None, Where.parse(where))
    with pytest.raises(ConfigError):
        purge.purge_store(tmp_path, None, "p0", Where.parse('prompt_id = "p0"'))
    with StoreLock(tmp_path, started_at=0.0), pytest.raises(StoreLocked):
        purge.purge_store(tmp_path, key_of(0).hex(), None)


# --- repair -------------------------------------------------------------------------------------------


def repaired(store: Path) -> dict[str, object]:
    data, left = verified(store, repair=True)
    assert left == 0
    result: dict[str, object] = data["repaired"]
    return result


def test_a_missing_shard_is_asked_again_and_nothing_else(tmp_path):
    make(tmp_path)
    sealed(tmp_path)[1].unlink()
    assert verified(tmp_path, repair=False)[1] == 1
    assert set(repaired(tmp_path)["lost"]) == {key_of(n).hex() for n in range(20, 40)}
    with Journal.open(tmp_path) as journal:
        assert len(journal.look_up([key_of(n) for n in range(80)])) == 60
    assert len(rows_of(tmp_path)) == 60


@pytest.mark.slow
def test_rows_that_still_read_are_saved_from_a_damaged_shard(tmp_path):
    rows = ROWS_PER_GROUP + 100
    with open_store(tmp_path) as journal:
        journal.apply([answer(n) for n in range(rows)])
        seal(journal, tmp_path, target_bytes=64 * MIB, everything=True)
    (path,) = sealed(tmp_path)
    meta = pq.read_metadata(path)
    assert meta.num_row_groups == 2
    damaged = bytearray(path.read_bytes())
    column = meta.row_group(1).column(0)
    middle = column.data_page_offset + column.total_compressed_size // 2
    damaged[middle : middle + 9] = bytes(9)  # more than the one byte that can be put back
    path.write_bytes(damaged)
    done = repaired(tmp_path)
    assert done["quarantined"] == (path.name,)
    assert (tmp_path / "quarantine" / path.name).read_bytes() == bytes(damaged)
    saved = meta.row_group(0).num_rows
    assert (done["saved"], len(done["lost"])) == (saved, rows - saved)
    assert len(rows_of(tmp_path)) == saved


def test_foreign_files_go_to_quarantine_and_nothing_is_lost(tmp_path):
    make(tmp_path)
    before = rows_of(tmp_path)
    (tmp_path / "shards" / "notes.parquet").write_bytes(b"mine")
    done = repaired(tmp_path)
    assert (done["quarantined"], done["saved"], done["lost"]) == (("notes.parquet",), 0, ())
    assert (tmp_path / "quarantine" / "notes.parquet").read_bytes() == b"mine"
    assert rows_of(tmp_path) == before


def test_a_lost_manifest_row_or_index_row_costs_nothing(tmp_path):
    import sqlite3

    make(tmp_path)
    before = rows_of(tmp_path)
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("DELETE FROM manifest WHERE shard = 2")
    connection.execute("DELETE FROM keys WHERE key = ?", (key_of(3),))
    connection.commit()
    connection.close()
    assert verified(tmp_path, repair=False)[1] > 0
    assert repaired(tmp_path)["lost"] == ()
    assert rows_of(tmp_path) == before
    with Journal.open(tmp_path) as journal:
        assert len(journal.look_up([key_of(n) for n in range(80)])) == 80


def test_what_nothing_proves_of_a_run_is_not_guessed(tmp_path):
    import sqlite3

    make(tmp_path, parts=1)
    before = rows_of(tmp_path)
    connection = sqlite3.connect(tmp_path / "journal.db")
    connection.execute("UPDATE runs SET ending = 'better'")
    connection.commit()
    connection.close()
    done = repaired(tmp_path)
    assert (done["lost"], len(done["notes"])) == ((), 1)
    with Journal.open(tmp_path) as journal, journal.reading() as connection:
        ((ending, lineage),) = connection.execute("SELECT ending, lineage_json FROM runs").fetchall()
    assert ending == "unknown"
    assert lineage == run_record().lineage().to_json().decode()  # out of the shard, which its hash proves
    assert rows_of(tmp_path) == before


def test_a_damaged_lineage_is_taken_from_the_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(mend_file, "MOST_HASHED", 1 << 20)  # bytes differ that no search for one bit finds
    make(tmp_path, parts=1)
    before = rows_of(tmp_path)
    (path,) = sealed(tmp_path)
    content = path.read_bytes()
    for old, new in ((b'"labels"', b'"labels}'), (b'mock-teacher"', b'meek-teacher"')):
        place = content.rindex(old)  # in the footer: a page would notice
        path.write_bytes(content[:place] + new + content[place + len(old) :])
        with Journal.open(tmp_path, read_only=True) as journal:
            wanted = [run.lineage() for run in [run_record()]]
            assert journal.totals().answers == 20
        assert repaired(tmp_path)["lost"] == ()
        assert rows_of(tmp_path) == before
        assert Corpus.open(tmp_path).lineages() == wanted
        (path,) = sealed(tmp_path)
        content = path.read_bytes()


@pytest.mark.parametrize(
    "flips",
    [
        4,
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(500, marks=pytest.mark.torture),
    ],
)
def test_after_any_flip_in_a_shard_repair_loses_only_rows_that_do_not_read(tmp_path, flips):
    import shutil

    store = tmp_path / "store"
    make(store, parts=2)
    before = rows_of(store)
    rng = random.Random(11)
    for _ in range(flips):
        copy = tmp_path / "copy"
        shutil.copytree(store, copy)
        path = sealed(copy)[0]
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        assert verified(copy, repair=False)[1] == 1
        lost = set(repaired(copy)["lost"])
        after = rows_of(copy)
        assert set(after) == set(before) - lost
        assert all(after[key] == before[key] for key in after)
        shutil.rmtree(copy)


def test_a_row_is_saved_only_when_its_columns_bear_each_other_out(tmp_path):
    witnessed = [name for name in SCHEMA.names if name not in recover_rows.UNCHECKED_COLUMNS]
    with open_store(tmp_path) as journal:
        fill(journal, range(len(witnessed) + 5))
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    (path,) = sealed(tmp_path)
    rows = pq.read_table(path).to_pylist()
    for row, name in zip(rows, witnessed, strict=False):
        row[name] = other_than(row[name], SCHEMA.field(name).type)
    lineages = Corpus.open(tmp_path).lineages()
    with path.open("wb") as sink, open_writer(sink, lineages) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
    done = repaired(tmp_path)
    assert set(done["lost"]) == {key_of(n).hex() for n in range(len(witnessed))}
    assert (done["saved"], set(rows_of(tmp_path))) == (5, {row["key"] for row in rows[-5:]})


THINKING = b'{"id": "r%d", "model": "m", "choices": [{"message": {"content": "<think>so</think>4"}, %s}]}'


def test_rows_that_an_earlier_release_read_otherwise_are_saved_from_damage(tmp_path, monkeypatch):
    """They are rows of a store that was never derived again: text with its reasoning inside, and so on."""

    def earlier(raw: bytes, *_: object, **__: object) -> Completion:
        number = int(json.loads(raw)["id"][1:])
        text = None if number == 3 else "<think>so</think>4"
        outcome = Outcome.UNKNOWN if number == 3 else Outcome.OK
        return Completion(text, outcome, "stop", Usage(12, 5), model="m", response_id=f"r{number}")

    raws = [THINKING % (number, b'"finish_reason": "stop"') for number in range(6)]
    with monkeypatch.context() as patched, open_store(tmp_path) as journal:
        patched.setattr(completion, "parse", earlier)
        fill_with = [
            store_rows.answer(n, raw=raw, outcome=Outcome.UNKNOWN if n == 3 else Outcome.OK)
            for n, raw in enumerate(raws)
        ]
        journal.apply([store_rows.intent(n) for n in range(6)])
        journal.apply(fill_with)
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    (path,) = sealed(tmp_path)
    rows = pq.read_table(path).to_pylist()
    changes = {1: {"completion": "<think>no</think>4"}, 2: {"outcome": "unknown"}, 4: {"raw": raws[4][:-60]}}
    for number, change in changes.items():
        rows[number].update(change)
    lineages = Corpus.open(tmp_path).lineages()
    with path.open("wb") as sink, open_writer(sink, lineages) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
    done = repaired(tmp_path)
    assert set(done["lost"]) == {key_of(number).hex() for number in changes}
    assert done["saved"] == 3
    rederive(tmp_path)
    texts = {row["reasoning"] for row in pq.read_table(sealed(tmp_path)[0]).to_pylist()}
    assert texts == {"so"}


def other_than(value: object, kind: pa.DataType) -> object:
    """Another value that a column of this type may hold."""
    if pa.types.is_list(kind):
        return [] if value else [None] if value is None else ["other"]
    if pa.types.is_boolean(kind):
        return not value
    if isinstance(value, int):
        return value + 1
    return b"{}" if pa.types.is_binary(kind) else "{ }" if value == "{}" else "{}"


def test_columns_without_a_witness_are_held_against_the_statistics(tmp_path):
    make(tmp_path, parts=1)
    (path,) = sealed(tmp_path)
    content = path.read_bytes()
    latest = struct.pack("<q", int((AT + 19) * 1e6))
    assert content.count(latest) > 1
    place = content.rindex(latest)  # in the footer, which carries no checksum
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    assert len(repaired(tmp_path)["lost"]) == 20


def test_verify_and_status_name_what_was_stored_billed_and_possibly_billed(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(3))
        journal.apply([intent(7), intent(8), intent(9)])
        lost = Failure(9, key_of(8), "timed_out", None, b"", maybe_billed=True, at=AT)
        journal.apply([lost, replace(lost, attempt_id=10, key=key_of(9), maybe_billed=False)])
    report = verify_with_bill(tmp_path, repair=False)
    data, lines, left = report.facts(), verify_lines(tmp_path, report), len(report.messages)
    assert (left, data["answers"], data["billed"], data["billed_microusd"]) == (0, 3, 3, 21)
    doubtful = [
        (attempt["key"], attempt["code"], attempt["reserved_microusd"]) for attempt in data["possibly_billed"]
    ]
    assert doubtful == [(key_of(7).hex(), "", 9), (key_of(8).hex(), "timed_out", 9)]
    assert data["possibly_billed_microusd"] == 18
    assert "3 answers stored, 0 findings; 3 billed for $0.000021, 2 attempts possibly billed" in lines
    for number, text in ((7, "no outcome"), (8, "timed_out")):
        (line,) = [line for line in lines if key_of(number).hex() in line]
        assert "at 2026-" in line
        assert line.endswith(f"reserved $0.000009 ({text})")
    json.dumps(data)
    status = current_status(tmp_path)
    assert (status["held"], status["billed"], status["possibly_billed"], status["without_outcome"]) == (
        3,
        3,
        2,
        1,
    )
    (line,) = [line for line in status_lines({**status, "run_id": "run-1"}) if line.startswith("ledger")]
    assert "3 answers stored, 3 billed for $0.0000, 2 possibly billed" in line


def test_a_folder_that_is_no_store_is_left_as_it_was(tmp_path):
    with pytest.raises(HarvesterError):
        verify_with_bill(tmp_path, repair=True)
    assert list(tmp_path.iterdir()) == []


def test_verify_and_repair_look_at_the_canaries_too(tmp_path):
    store, canaries = tmp_path / "store", tmp_path / "store" / "canary"
    for folder in (store, canaries):
        with store_rows.open_store(folder) as journal:
            store_rows.fill(journal, range(6))
            seal(journal, folder, target_bytes=1 << 20, everything=True)
    assert verified(store, repair=False)[0]["findings"] == []
    (shard,) = (canaries / "shards").glob("*.parquet")
    changed = bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    data, count = verified(store, repair=False)
    assert count == 1
    assert data["findings"][0].startswith(f"canary: changed: shards/{shard.name}")
    assert data["answers"] == 6, "canaries are no rows of the corpus"
    data, count = verified(store, repair=True)
    assert (count, data["repaired"]["quarantined"]) == (0, (f"canary/{shard.name}",))
    with StoreLock(store, started_at=0.0):  # a run that is just sealing its canaries
        with Journal.open(canaries, read_only=True) as journal:
            name = f"part-{journal.next_shard():08d}-0123456789abcdef.parquet"
        stray = canaries / "shards" / name
        stray.write_bytes(b"PAR1")
        findings = verified(store, repair=False)[0]["findings"]
    assert findings == [], findings
    assert verified(store, repair=False)[1] == 1


def test_a_journal_of_which_nothing_can_be_read_leaves_the_shards_as_a_corpus(tmp_path):
    make(tmp_path)
    for name in ("journal.db-wal", "journal.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    with (tmp_path / "journal.db").open("r+b") as journal:
        journal.truncate(5000)
    with pytest.raises(HarvesterError) as refusal:
        verify_with_bill(tmp_path, repair=True)
    assert "nothing of it can be read" in refusal.value.remedy
    assert "--repair" not in refusal.value.remedy
    assert len(list(Corpus.open(tmp_path / "shards").samples(["key"]))) == 80

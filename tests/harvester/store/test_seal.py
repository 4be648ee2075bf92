"""Test sealing: whole files only, one lineage a file, equal bytes for equal answers, kills lose nothing."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harvester.errors import StoreError
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA
from harvester.store.shards.seal import seal
from tests import commands
from tests.harvester.store_rows import (
    answer,
    fill,
    intent,
    key_of,
    open_store,
    prompt_of,
    raw_of,
    run_record,
    without_outcome,
)

ROOT = Path(__file__).resolve().parents[3]
MIB = 1024 * 1024


def sealed(store: Path) -> list[Path]:
    return sorted((store / "shards").glob("*.parquet"))


def test_answers_move_into_a_file_that_any_reader_opens(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(50))
        sealed_now = seal(journal, tmp_path, target_bytes=64 * MIB, everything=True)
        assert (sealed_now.rows, len(sealed_now.files)) == (50, 1)
        assert seal(journal, tmp_path, target_bytes=64 * MIB, everything=True).rows == 0
        with journal.reading() as connection:
            assert connection.execute("SELECT count(*) FROM answers").fetchone() == (0,)
        held = journal.look_up([key_of(n) for n in range(50)])
        assert {(entry.state, entry.outcome, entry.max_tokens) for entry in held.values()} == {
            ("answered", "ok", 64)
        }
    table = pq.read_table(tmp_path / "shards")
    assert table.schema.equals(SCHEMA)
    row = table.to_pylist()[7]
    assert row["key"] == key_of(7).hex()
    assert row["completion"] == "8"
    assert row["raw"] == raw_of(7)
    assert json.loads(row["request_json"])["max_tokens"] == 64
    assert [message["role"] for message in row["messages"]] == ["system", "user"]
    assert (row["prompt_id"], row["reference"], row["source_line"]) == ("p7", "8", 8)
    assert (row["run_id"], row["terms_id"], row["mock"]) == ("run-1", "mock-teacher", False)
    assert (row["response_model"], row["finish_reason"], row["usage_source"]) == (
        "mock-2026",
        "stop",
        "reported",
    )
    lineages = json.loads(pq.read_schema(sealed(tmp_path)[0]).metadata[LINEAGE_KEY])
    assert [(entry["run_id"], entry["started_at"]) for entry in lineages] == [
        ("run-1", "2026-09-21T14:13:20.250+00:00")
    ]


def test_small_amounts_wait_unless_everything_is_asked_for(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(50))
        assert seal(journal, tmp_path, target_bytes=MIB, everything=False).rows == 0
        assert seal(journal, tmp_path, target_bytes=2000, everything=False).rows == 50


def test_runs_of_different_terms_never_share_a_file_and_equal_ones_do(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(10))
        journal.begin_run(run_record("run-2"))
        fill(journal, range(10, 20))
        journal.begin_run(run_record("run-3", mock=True))
        fill(journal, range(20, 30))
        journal.begin_run(run_record("run-4", purpose="eval"))
        fill(journal, range(30, 40))
        sealed_now = seal(journal, tmp_path, target_bytes=64 * MIB, everything=True)
    runs = {frozenset(pq.read_table(path)["run_id"].to_pylist()) for path in sealed(tmp_path)}
    assert runs == {frozenset({"run-1", "run-2"}), frozenset({"run-3"}), frozenset({"run-4"})}
    assert sealed_now.rows == 40
    lineages = Corpus.open(tmp_path).lineages()
    assert [lineage.run_id for lineage in lineages] == [
        "run-1",
        "run-2",
        "run-3",
        "run-4",
    ]


def test_the_same_answers_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        with open_store(tmp_path / name) as journal:
            fill(journal, range(30))
            seal(journal, tmp_path / name, target_bytes=64 * MIB, everything=True)
    (first_shard,), (second_shard,) = sealed(tmp_path / "a"), sealed(tmp_path / "b")
    assert first_shard.name == second_shard.name
    assert first_shard.read_bytes() == second_shard.read_bytes()


@pytest.mark.slow
def test_shards_stop_at_their_target_size(tmp_path):
    rng = random.Random(1)
    with open_store(tmp_path) as journal:
        journal.apply([answer(n, raw=raw_of(n, content=rng.randbytes(8000).hex())) for n in range(3000)])
        sealed_now = seal(journal, tmp_path, target_bytes=MIB, everything=True)
    assert len(sealed_now.files) >= 2
    assert Corpus.open(tmp_path).count() == sealed_now.rows == 3000
    assert Corpus.open(tmp_path).verify() == []


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"\xff\xfe", b'{"choices": []}', b'{"error": {"message": "quota"}}', b"[" * 9000]
)
def test_an_answer_that_can_not_be_parsed_is_sealed_raw(tmp_path, raw):
    with open_store(tmp_path) as journal:
        journal.apply([answer(0, raw=raw)])
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    (row,) = pq.read_table(tmp_path / "shards").to_pylist()
    assert (row["raw"], row["completion"], row["outcome"]) == (raw, None, "unknown")


def test_odd_text_never_stops_the_sealing(tmp_path):
    odd = prompt_of(
        0, id="\udcff", metadata={"s": "\ud800", "n": 2**80}, file="\udcff.jsonl", tags=("\ud83d",)
    )
    with open_store(tmp_path) as journal:
        journal.apply([answer(0, prompt=odd), answer(1, prompt=prompt_of(1, reference="\x00\u2028"))])
        assert seal(journal, tmp_path, target_bytes=MIB, everything=True).rows == 2
    rows = pq.read_table(tmp_path / "shards").to_pylist()
    assert rows[0]["prompt_id"] == "?"
    assert (
        json.loads(rows[0]["metadata_json"])["n"] == str(2**80)
        or json.loads(rows[0]["metadata_json"])["n"] == 2**80
    )
    assert rows[1]["reference"] == "\x00\u2028"


def test_logprobs_survive_the_way_into_the_shard(tmp_path):
    logprobs = {
        "content": [
            {
                "token": "8",
                "bytes": [56],
                "logprob": -0.5,
                "top_logprobs": [{"token": "9", "bytes": None, "logprob": -1}],
            }
        ]
    }
    raw = json.loads(raw_of(7))
    raw["choices"][0]["logprobs"] = logprobs
    with open_store(tmp_path) as journal:
        journal.apply([answer(7, raw=json.dumps(raw).encode())])
        seal(journal, tmp_path, target_bytes=MIB, everything=True)
    (row,) = pq.read_table(tmp_path / "shards").to_pylist()
    assert row["logprobs"] == [
        {
            "token": "8",
            "bytes": b"8",
            "logprob": -0.5,
            "top": [{"token": "9", "bytes": None, "logprob": -1.0}],
        }
    ]


def test_a_folder_that_can_not_be_written_keeps_the_answers_journalled(tmp_path):
    with open_store(tmp_path) as journal:
        fill(journal, range(5))
        (tmp_path / "shards").write_text("in the way")
        with pytest.raises(StoreError):
            seal(journal, tmp_path, target_bytes=MIB, everything=True)
        (tmp_path / "shards").unlink()
        assert seal(journal, tmp_path, target_bytes=MIB, everything=True).rows == 5


def write_until_killed(
    store: Path, first: int, *, acks: int | None = None, failpoint: str = ""
) -> tuple[set[int], set[int]]:
    """Run the writer process; kill it after so many acknowledgements, or let the failpoint do it.

    Returns the numbers that were sent and those acknowledged as stored.
    """
    process = commands.Command(
        "tests.harvester.store_writer",
        [store, first],
        stderr=None,
        environment={"HARVESTER_FAILPOINT": failpoint},
        cwd=ROOT,
    )
    sent, stored = set(), set()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("sent"):
            sent.add(int(line[5:]))
        else:
            stored.add(int(line))
        if acks is not None and len(stored) == acks:
            process.kill()
            acks = None
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    return sent, stored


def check_after_kill(store: Path, sent: set[int], stored: set[int]) -> set[int]:
    """Nothing acknowledged is lost, nothing comes twice, everything lost was noted; returns what is held."""
    corpus = Corpus.open(store)
    rows = [sample.key for sample in corpus.samples(["key"])]
    assert len(rows) == len(set(rows)) == corpus.count()
    number_of = {key_of(number).hex(): number for number in range(10_000)}
    held = {number_of[key] for key in rows}
    assert stored <= held <= sent
    with Journal.open(store, read_only=True) as journal:
        noted = {number_of[entry.key.hex()] for entry in without_outcome(journal)}
    assert sent - held <= noted  # possibly billed, and listed as such
    if sealed(store):
        plain = pq.read_table(store / "shards", columns=["key"])["key"].to_pylist()
        assert len(plain) == len(set(plain))
        assert {number_of[key] for key in plain} <= held
    return held


@pytest.mark.parametrize(
    "failpoint",
    [
        pytest.param("journal.after_insert:20", marks=pytest.mark.slow),
        "journal.after_commit:20",
        pytest.param("shards.after_write:2", marks=pytest.mark.slow),
        pytest.param("shards.before_rename:2", marks=pytest.mark.slow),
        "shards.after_rename:2",
        pytest.param("shards.before_commit:2", marks=pytest.mark.slow),
        "shards.after_commit:2",
    ],
)
def test_a_kill_at_a_failpoint_loses_nothing_acknowledged(tmp_path, failpoint):
    store = tmp_path / "store"
    sent, stored = write_until_killed(store, 0, failpoint=failpoint)
    held = check_after_kill(store, sent, stored)
    with Journal.open(store) as journal:  # the next life goes on, and finishes what this one began
        journal.begin_run(run_record("after"))
        first = journal.next_attempt_id()
        more = range(9000, 9010)
        journal.apply([intent(n, "after", first + n) for n in more])
        journal.apply([answer(n, attempt_id=first + n) for n in more])
        in_journal = len(held) + len(more) - sum(entry.rows for entry in Corpus.open(store).manifest)
        assert seal(journal, store, target_bytes=MIB, everything=True).rows == in_journal
    assert check_after_kill(store, sent | set(more), stored) == held | set(more)
    assert Corpus.open(store).verify() == []
    assert sum(entry.rows for entry in Corpus.open(store).manifest) == len(held) + len(more)


@pytest.mark.slow
def test_kills_at_random_instants_lose_nothing_acknowledged(tmp_path):
    store = tmp_path / "store"
    rng = random.Random(20261124)
    all_sent: set[int] = set()
    all_stored: set[int] = set()
    for run in range(4):
        sent, stored = write_until_killed(store, 600 * run, acks=rng.randrange(1, 450))
        all_sent |= sent
        all_stored |= stored
        check_after_kill(store, all_sent, all_stored)
    with Journal.open(store) as journal:
        seal(journal, store, target_bytes=MIB, everything=True)
    check_after_kill(store, all_sent, all_stored)
    assert Corpus.open(store).verify() == []

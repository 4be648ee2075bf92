"""Test that columns are derived again from `raw`: lineage stays, readers see whole stores, kills are safe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.api.replies import completion
from harvester.api.types import Completion, Outcome, Usage
from harvester.errors import ShardsInUse, StoreError
from harvester.store import paths
from harvester.store.maintain import rederive as module
from harvester.store.maintain.rederive import rederive
from harvester.store.reader import Corpus
from harvester.store.shards import rewrite, swap
from harvester.store.shards.manifest import read_manifest
from harvester.store.shards.seal import seal
from tests.harvester.store_rows import answer, intent, key_of, open_store, verified

PARTS = [{"type": "text", "text": "The answer "}, {"type": "text", "text": "is four."}]
LEARNED = ("eos_token", "max_tokens", "SAFETY")


def raw_of(number: int) -> bytes:
    """An answer in parts, with a finish word of another spelling for each of three rows."""
    choice = {"index": 0, "message": {"content": PARTS}, "finish_reason": LEARNED[number % 3]}
    usage = {"prompt_tokens": 12, "completion_tokens": 5}
    return orjson.dumps({"id": f"r{number}", "model": "mock-2026", "choices": [choice], "usage": usage})


def earlier_parse(raw: bytes, *_: object, **__: object) -> Completion:
    """What an earlier release made of these answers: the last part, outcome unknown."""
    return Completion("is four.", Outcome.UNKNOWN, "", Usage(12, 5))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of 30 answers and 30 unsealed ones, all as an earlier release stored them."""
    folder = tmp_path / "store"
    with monkeypatch.context() as patched, open_store(folder) as journal:
        patched.setattr(completion, "parse", earlier_parse)
        for start in (0, 30, 60):
            numbers = range(start, start + 30)
            journal.apply([intent(number) for number in numbers])
            journal.apply([answer(number, raw=raw_of(number), outcome=Outcome.UNKNOWN) for number in numbers])
            if start < 60:
                seal(journal, folder, target_bytes=1 << 30, everything=True)
    return folder


def table_of(store: Path) -> pa.Table:
    files = sorted((store / paths.SHARDS).glob("part-*"))
    return pa.concat_tables(pq.read_table(path) for path in files)


def test_columns_follow_what_the_program_learned(store: Path) -> None:
    before = table_of(store)
    assert set(before["outcome"].to_pylist()) == {"unknown"}
    rederived = rederive(store)
    assert (rederived.rows, rederived.changed, rederived.shards) == (90, 90, 2)
    assert rederived.outcomes == {"unknown -> ok": 30, "unknown -> truncated": 30, "unknown -> filtered": 30}
    after = table_of(store)
    assert set(after["completion"].to_pylist()) == {"The answer is four."}
    other_columns = [name for name in before.column_names if name not in module.PARSED]
    assert after.select(other_columns).equals(before.select(other_columns))
    with open_store(store, run_id="run-2") as journal:
        held = journal.look_up([key_of(number) for number in range(90)])
        assert [held[key_of(number)].outcome for number in (0, 1, 2, 60)] == [
            "ok",
            "truncated",
            "filtered",
            "ok",
        ]
        counts = journal.totals().outcomes
        assert {name: count for name, count in counts.items() if count} == {
            "ok": 30,
            "truncated": 30,
            "filtered": 30,
        }
    facts, findings = verified(store, repair=False)
    assert findings == 0, facts


def test_lineage_and_manifest_stay_whole(store: Path) -> None:
    with open_store(store, run_id="run-2") as journal:
        before = read_manifest(journal)
    lineages = sorted(lineage.run_id for lineage in Corpus.open(store).lineages())
    rederive(store)
    with open_store(store, run_id="run-3") as journal:
        after = read_manifest(journal)
    assert [shard.rows for shard in after] == [shard.rows for shard in before]
    assert {shard.lineage_digest for shard in after} == {shard.lineage_digest for shard in before}
    assert {shard.shard for shard in after}.isdisjoint(shard.shard for shard in before)
    assert sorted(lineage.run_id for lineage in Corpus.open(store).lineages()) == lineages


def test_nothing_to_learn_changes_no_byte(store: Path) -> None:
    rederive(store)
    shards = {path.name for path in (store / paths.SHARDS).iterdir()}
    again = rederive(store)
    assert (again.rows, again.changed, again.shards, again.outcomes) == (90, 0, 0, {})
    assert {path.name for path in (store / paths.SHARDS).iterdir()} == shards


def test_a_reader_is_waited_for_and_disturbed_by_nothing(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewrite, "PATIENCE_S", 0.1)
    before = table_of(store)
    with swap.hold_for_reading(store / paths.SHARDS), pytest.raises(ShardsInUse):
        rederive(store)
    assert table_of(store).equals(before)
    assert rederive(store).shards == 2


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        rederive(tmp_path)
    assert not list(tmp_path.iterdir())


KILL_POINTS = (
    "compaction.before_exchange",
    "compaction.after_exchange",
    "compaction.before_commit",
    "compaction.after_commit",
    "rederive.before_index",
)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=pytest.mark.slow) for point in KILL_POINTS[:-1]] + [KILL_POINTS[-1]]
)
def test_a_kill_at_any_instant_loses_nothing_and_the_next_call_completes(store: Path, point: str) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from harvester.system import failpoints\n"
        "from harvester.store.maintain import rederive\n"
        "from harvester.store.shards import rewrite\n"
        "def reach(name):\n"
        f"    if name == {point!r}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "rederive.reach = rewrite.reach = reach\n"
        "rederive.rederive(Path(sys.argv[1]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(store)], check=False, env=dict(os.environ), timeout=240
    )
    assert killed.returncode == -9, "the kill point was not reached"
    assert sum(1 for _ in Corpus.open(store).samples(["key"])) == 90
    rederive(store)
    facts, findings = verified(store, repair=False)
    assert findings == 0, facts
    rows = {row.key: row for row in Corpus.open(store).samples(["key", "completion", "outcome"])}
    assert len(rows) == 90
    assert {row.completion for row in rows.values()} == {"The answer is four."}
    with open_store(store, run_id="run-2") as journal:
        held = journal.look_up([key_of(number) for number in range(90)])
    assert all(held[bytes.fromhex(key)].outcome == row.outcome for key, row in rows.items())

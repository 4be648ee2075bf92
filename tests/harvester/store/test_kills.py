"""Kill a real harvest with 128 requests in flight many times; compare the teacher's ledger and the store.

Nothing that was counted as stored is lost; what is paid twice was on the list of possibly billed attempts;
in the end the corpus is exactly what was asked for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from tests.harvester.killed_runs import KilledRuns, quick_folder, write_config
from tests.harvester.store_rows import without_outcome

FAILPOINTS = (
    "journal.after_insert:{}",
    "journal.after_commit:{}",
    "shards.after_write:1",
    "shards.before_rename:1",
    "shards.after_rename:1",
    "shards.before_commit:1",
    "shards.after_commit:1",
    "compaction.before_exchange:1",
    "compaction.after_exchange:1",
    "compaction.before_commit:1",
    "compaction.after_commit:1",
)
TORTURE_KILLS = int(os.environ.get("TORTURE_KILLS", "1000"))


def look(store: Path) -> tuple[int, int]:
    """Answers held, each once; and attempts without an outcome."""
    if not (store / "journal.db").exists():
        return 0, 0
    keys = [sample.key for sample in Corpus.open(store).samples(["key"])]
    assert len(keys) == len(set(keys))
    with Journal.open(store, read_only=True) as journal:
        totals = journal.totals()
        assert totals.answers == len(keys)
        assert totals.paid_twice == 0
        return len(keys), len(without_outcome(journal))


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(5, marks=pytest.mark.slow),
        pytest.param(50, marks=pytest.mark.long),
        pytest.param(TORTURE_KILLS, marks=pytest.mark.torture),
    ],
)
def test_kills_lose_nothing_and_pay_twice_only_what_was_in_flight(
    mock_teacher: Callable[..., RunningMock], kills: int
) -> None:
    mock = mock_teacher(latency_s=0.25)
    prompts = 90 * kills
    rng = random.Random(kills)
    held = killed = 0
    in_flight: list[int] = []
    with quick_folder() as folder:
        store = folder / "store"
        with KilledRuns(write_config(folder, mock.base_url, prompts)) as runs:
            for run in range(3 * kills):
                point = rng.choice(FAILPOINTS).format(rng.randrange(1, 30)) if run % 2 else "-"
                status, stored = runs.run(rng.uniform(0.05, 0.4), point)
                assert status in {-9, 0}
                killed += status == -9
                before = held
                held, dangling = look(store)
                in_flight.append(dangling - sum(in_flight))  # lost with this life
                assert held >= before + stored  # 0 acknowledged answers lost
                # The teacher's side: whatever it was paid for is held, or noted as possibly billed.
                assert mock.totals()["requests"] <= held + dangling
                if killed == kills or status == 0:
                    break
            status, _ = runs.run(600)
        assert status == 0
        held, dangling = look(store)
        samples = list(Corpus.open(store).samples(["prompt_id"]))
        assert sorted(sample.prompt_id for sample in samples) == sorted(f"p{n}" for n in range(prompts))
        assert Corpus.open(store).verify() == []
        ledger = mock.totals()
        twice = ledger["requests"] - ledger["bodies"]
        assert ledger["bodies"] == held == prompts
        assert twice <= dangling
        with Journal.open(store, read_only=True) as journal:
            shards, files = journal.next_shard() - 1, len(list((store / "shards").glob("*.parquet")))
    many = sum(number >= 100 for number in in_flight)
    print(
        f"{killed} kills, {many} under 100 or more in flight; 0 lost, {twice} paid twice of {dangling}"
        f" in flight; {shards} shards sealed or merged, {files} left"
    )
    assert killed >= min(kills, 50)
    if kills >= 50:  # a few kills may all come before the window is full and before shards are merged
        assert max(in_flight) >= 100
        assert files < shards

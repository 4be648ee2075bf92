"""SIGKILL a real harvest, with 128 requests in flight, again and again: teacher's ledger against store.

Nothing that was counted as stored is lost; what is paid twice was on the list of possibly billed attempts;
in the end the corpus is exactly what was asked for.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harvester.corpus import Corpus
from harvester.journal import Journal
from harvester.mock_teacher.running import RunningMock

ROOT = Path(__file__).resolve().parents[2]
FAILPOINTS = (
    "journal.after_insert:{}", "journal.after_commit:{}", "shards.after_write:1", "shards.before_rename:1",
    "shards.after_rename:1", "shards.before_commit:1", "shards.after_commit:1",
)  # fmt: skip
TORTURE_KILLS = int(os.environ.get("TORTURE_KILLS", "1000"))


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Callable[..., tuple[int, int]]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harvester.harvest_lives", str(tmp_path / "harvest.toml")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def live(seconds: float, failpoint: str = "-") -> tuple[int, int]:
        process.stdin.write(f"{seconds} {failpoint}\n")
        process.stdin.flush()
        status, stored = process.stdout.readline().split()
        return int(status), int(stored)

    yield live
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


def write_config(folder: Path, base_url: str, prompts: int) -> None:
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "harvest.toml").write_text(
        f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        "[teacher.limits]\nmax_concurrency = 128\n[sampling]\nmax_tokens = 64\n"
        '[prompts]\nfiles = ["prompts.jsonl"]\n[store]\npath = "store"\nshard_mib = 0.02\nmin_free_mib = 1\n'
    )


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
        return len(keys), len(journal.dangling())


@pytest.mark.parametrize("kills", [50, pytest.param(TORTURE_KILLS, marks=pytest.mark.torture)])
def test_kills_lose_nothing_and_pay_twice_only_what_was_in_flight(
    mock_teacher: Callable[..., RunningMock],
    lives: Callable[..., tuple[int, int]],
    tmp_path: Path,
    kills: int,
) -> None:
    mock = mock_teacher(latency_s=0.04)
    prompts = 90 * kills
    write_config(tmp_path, mock.base_url, prompts)
    rng = random.Random(kills)
    held = killed = 0
    for life in range(3 * kills):
        point = rng.choice(FAILPOINTS).format(rng.randrange(1, 30)) if life % 2 else "-"
        status, stored = lives(rng.uniform(0.1, 0.5) + prompts / 50_000, point)
        assert status in {-9, 0}
        killed += status == -9
        before = held
        held, dangling = look(tmp_path / "store")
        assert held >= before + stored  # 0 acknowledged answers lost
        # The teacher's side: whatever it was paid for is held, or noted as possibly billed.
        assert mock.totals()["requests"] <= held + dangling
        if killed == kills or status == 0:
            break
    status, _ = lives(600)
    assert status == 0
    held, dangling = look(tmp_path / "store")
    samples = list(Corpus.open(tmp_path / "store").samples(["prompt_id"]))
    assert sorted(one.prompt_id for one in samples) == sorted(f"p{n}" for n in range(prompts))
    assert Corpus.open(tmp_path / "store").verify() == []
    ledger = mock.totals()
    twice = ledger["requests"] - ledger["bodies"]
    assert ledger["bodies"] == held == prompts
    assert twice <= dangling
    print(f"{killed} kills, 0 lost, {twice} paid twice of {dangling} in flight at a kill")
    assert killed >= min(kills, 50)

"""Kill runs whose requests ask for several samples: the answers of a request land together or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from harvester.store.journal.journal import Journal
from harvester.store.maintain.verify_report import verify_with_bill
from harvester.store.reader import Corpus
from tests.harvester.killed_runs import KilledRuns, quick_folder
from tests.harvester.store_rows import without_outcome

SAMPLES = 4
# Where a run is killed: while answers are written, right after that, and while they are sealed.
KILLS = ("journal.after_insert:{}", "journal.after_commit:{}", "shards.before_commit:1")


def write_config(folder: Path, mock: RunningMock, prompts: int) -> Path:
    rows = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(prompts)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "harvest.toml"
    path.write_text(
        f'[teacher]\nbase_url = "{mock.base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        f"max_n = {SAMPLES}\n"
        "[teacher.limits]\nmax_concurrency = 64\n[teacher.price]\ninput = 3.0\noutput = 10.0\n"
        f"[sampling]\nmax_tokens = 64\nsamples = {SAMPLES}\ntemperature = 1.0\n"
        '[prompts]\nfiles = ["p.jsonl"]\n[store]\npath = "store"\nshard_mib = 0.2\nmin_free_mib = 1\n'
    )
    return path


def look(store: Path) -> tuple[int, int]:
    """Return the rows held and the attempts without an outcome; every request has all of its rows or none."""
    rows = list(Corpus.open(store).samples(["key", "response_id", "prompt_id"]))
    assert len({row.key for row in rows}) == len(rows)
    assert set(Counter(row.response_id for row in rows).values()) <= {SAMPLES}
    with Journal.open(store, read_only=True) as journal:
        totals = journal.totals()
        assert (totals.answers, totals.paid_twice) == (len(rows), 0)
        return len(rows), len(without_outcome(journal))


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kill_loses_all_answers_of_a_request_or_none(
    mock_teacher: Callable[..., RunningMock], kills: int
) -> None:
    prompts = 50 * kills
    mock = mock_teacher(latency_s=0.05)
    with quick_folder() as folder:
        store, killed, held, dangling = folder / "store", 0, 0, 0
        with KilledRuns(write_config(folder, mock, prompts)) as runs:
            for run in range(kills):
                status, stored = runs.run(5.0, KILLS[run % 3].format(3 + run % 5))
                before = held
                held, dangling = look(store)
                killed += status == -9
                assert held >= before + stored
                assert mock.totals()["answers"] <= held + dangling
            assert runs.run(600.0)[0] == 0
        held, dangling = look(store)
        assert held == prompts * SAMPLES
        ledger = mock.totals()
        paid_twice = ledger["answers"] - held
        assert paid_twice <= dangling
        assert paid_twice % SAMPLES == 0
        assert not verify_with_bill(store, repair=False).findings
    assert killed == kills

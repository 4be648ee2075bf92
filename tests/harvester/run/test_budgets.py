"""Test budgets of a store, a day and a month: spending in the ledger counts after kills and over midnight."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from harvester.config.budget_spans import BudgetSpan
from harvester.config.overrides import Overrides
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock
from harvester.observe.report.report import progress
from harvester.observe.status import current_status, status_lines
from harvester.run import job
from harvester.run.planning.plan import budgets
from harvester.run.prepare import Prepared, look_ahead, prepare
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Intent, RunRecord
from harvester.store.maintain.bill import compute_spent
from harvester.store.maintain.purge import purge_store
from tests.faults.bench import Hasty, run_harvest
from tests.faults.test_process import until_asked
from tests.journey.run_process import harvester, running, write_folder

Mock = Callable[..., RunningMock]
MANY = tuple(f"What is {number} + 30?" for number in range(100, 160))
WORDS = 100
LONG_ANSWER = {
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": " ".join(["a"] * WORDS)},
        }
    ]
}
PRICE = {"price": {"input": 10.0, "output": 30.0}}


def spent(store: Path, wall: float | None = None) -> dict[BudgetSpan, tuple[int, int]]:
    with Journal.open(store, read_only=True) as journal:
        return compute_spent(journal, datetime.now(UTC).timestamp() if wall is None else wall)


@pytest.mark.parametrize("table", ["store", "day", "month"])
def test_runs_one_after_another_share_a_ceiling_that_lasts(
    mock_teacher: Mock, tmp_path: Path, table: str
) -> None:
    mock = mock_teacher()
    first = run_harvest(mock, tmp_path, prompts=MANY, budget={table: {"tokens": 500}})
    again = run_harvest(mock, tmp_path, prompts=MANY, budget={table: {"tokens": 500}})
    assert (first.exit_code, again.exit_code, again.billed["requests"]) == (10, 10, 0)
    assert 0 < mock.totals()["total_tokens"] <= 500
    assert f"[budget.{table}]" in again.output
    raised = run_harvest(mock, tmp_path, prompts=MANY, budget={table: {"tokens": 690}})
    assert raised.billed["requests"] > 0
    assert 500 < mock.totals()["total_tokens"] <= 690


def test_the_ledger_agrees_with_what_the_teacher_billed(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=MANY, teacher=PRICE)
    run_harvest(mock, tmp_path, prompts=MANY, teacher=PRICE, sampling={"seed": 7})
    billed = mock.totals()
    amounts = (billed["total_tokens"], billed["prompt_tokens"] * 10 + billed["completion_tokens"] * 30)
    assert set(spent(tmp_path / "store").values()) == {amounts, (0, 0)}  # the last run was not killed
    assert spent(tmp_path / "store")[BudgetSpan.RUN] == (0, 0)


def test_a_new_day_is_a_new_budget_and_the_store_goes_on(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=MANY[:20])
    today = spent(tmp_path / "store")[BudgetSpan.DAY]
    tomorrow = spent(tmp_path / "store", BudgetSpan.DAY.end(datetime.now(UTC).timestamp()))
    assert tomorrow[BudgetSpan.DAY] == (0, 0)
    assert tomorrow[BudgetSpan.STORE] == today


class Midnight(Hasty):
    """A clock whose day ends once the teacher has got so many requests."""

    def __init__(self, mock: RunningMock, requests: int) -> None:
        super().__init__()
        self._mock, self._requests = mock, requests

    def wall(self) -> float:
        evening = datetime(2026, 11, 28, 23, 59, tzinfo=UTC).timestamp()
        return evening if self._mock.state()["received"] < self._requests else evening + 3600


def test_a_run_that_passes_midnight_begins_a_new_day(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    one_day = run_harvest(
        mock, tmp_path, prompts=MANY, budget={"day": {"tokens": 500}}, clock=Midnight(mock, 10**9)
    )
    assert one_day.exit_code == 10
    (tmp_path / "other").mkdir()
    two_days = run_harvest(
        mock,
        tmp_path / "other",
        prompts=MANY,
        budget={"day": {"tokens": 500}},
        clock=Midnight(mock, mock.state()["received"] + 20),
    )
    assert one_day.billed["total_tokens"] <= 500 < two_days.billed["total_tokens"] <= 1000


@pytest.mark.parametrize(
    "span",
    ["run", pytest.param("store", marks=pytest.mark.slow), pytest.param("day", marks=pytest.mark.slow)],
)
def test_kills_renew_no_budget(mock_teacher: Mock, tmp_path: Path, span: str) -> None:
    mock = mock_teacher(latency_s=0.05)
    more = f"[budget.{span}]\ntokens = 3000\n"
    config = write_folder(
        tmp_path, mock.base_url, 400, teacher="[teacher.limits]\nmax_concurrency = 4\n", more=more
    )
    for requests in (30, 60):
        with running(config) as run:
            until_asked(mock, run, requests)
            run.signal(signal.SIGKILL)
            run.process.wait()
    ended = harvester("run", config)
    assert ended.returncode == 10
    assert ended.stdout.startswith("budget")
    assert 0 < mock.totals()["total_tokens"] <= 3000
    if span != "run":
        assert harvester("run", config).returncode == 10
        assert mock.totals()["total_tokens"] <= 3000


def test_a_purge_leaves_the_ledger_as_it_is(tmp_path: Path) -> None:
    now = datetime.now(UTC).timestamp()
    with Journal.open(tmp_path) as journal:
        journal.begin_run(RunRecord("killed", now, "t|m"))
        journal.apply([Intent(number, bytes([number]) * 32, "killed", "t", now, 100, 7) for number in (1, 2)])
    before = spent(tmp_path)
    assert before[BudgetSpan.STORE] == (200, 14)
    purge_store(tmp_path, (bytes([1]) * 32).hex(), None)
    assert spent(tmp_path) == before
    with Journal.open(tmp_path) as journal:
        journal.begin_run(RunRecord("next", now, "t|m"))
        assert compute_spent(journal, now, "t|m")[BudgetSpan.RUN] == (200, 14)
        assert compute_spent(journal, now, "other|m")[BudgetSpan.RUN] == (0, 0)
        journal.end_run("next", "complete", 0, now)
        journal.begin_run(RunRecord("last", now, "t|m"))
        assert compute_spent(journal, now, "t|m")[BudgetSpan.RUN] == (0, 0)


def test_plan_status_and_the_start_of_a_run_say_what_is_left(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    budget = {"usd": 5.0, "store": {"usd": 1.0}, "day": {"tokens": 100_000}}
    run_harvest(mock, tmp_path, prompts=MANY[:20], teacher=PRICE, budget=budget)
    billed = mock.totals()
    left = 1_000_000 - billed["prompt_tokens"] * 10 - billed["completion_tokens"] * 30
    plan = look_ahead(tmp_path / "harvest.toml")
    assert plan.budgets["store"]["microusd_left"] == left
    assert plan.budgets["day"]["tokens_left"] == 100_000 - billed["total_tokens"]
    assert plan.budgets["run"]["microusd_left"] == 5_000_000
    status = current_status(tmp_path / "store")
    assert status["budgets"]["store"]["microusd_left"] == left
    text = f"this store: ${left / 1e6:.4f} left of $1.0000"
    bars = [bar["said"] for bar in progress(status) if bar["name"] == "budget, store"]
    assert len(bars) == 1
    for lines in (plan.lines(), status_lines(status), prepare(tmp_path / "harvest.toml").lines()):
        assert any(text in line for line in lines)


def test_an_old_price_is_pointed_out(mock_teacher: Mock, tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    for days, is_old in ((91, True), (90, False), (-3, False)):
        as_of = (today - timedelta(days=days)).isoformat()
        price = {"price": {**PRICE["price"], "as_of": as_of}}
        run_harvest(mock_teacher(), tmp_path, prompts=MANY[:1], teacher=price)
        text = "\n".join(look_ahead(tmp_path / "harvest.toml").lines())
        started = "\n".join(prepare(tmp_path / "harvest.toml").lines())
        assert (f"{days} days old" in text) == (f"{days} days old" in started) == is_old


def test_an_ending_by_the_budget_says_what_was_reserved(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    ended = run_harvest(mock, tmp_path, prompts=MANY, budget={"tokens": 700}, sampling={"max_tokens": 256})
    assert ended.exit_code == 10
    why = next(line for line in ended.output.splitlines() if line.startswith("why: "))
    assert f"{ended.billed['total_tokens']:,} of 700 tokens" in why
    assert "would reserve" in why


def test_ceilings_of_a_run_can_hold_for_the_store(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    config = write_folder(tmp_path, mock.base_url, 100)
    flags = Overrides(tokens=900, budget_span=BudgetSpan.STORE)
    for _ in range(3):
        summary = asyncio.run(job.run(prepare(config, flags), lambda _: None))
        assert summary.exit_code == 10
        assert "--budget-per store" in summary.resume
    assert 0 < mock.totals()["total_tokens"] <= 900


def test_runs_of_one_opening_share_the_ceiling_of_a_run(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher()
    hours = '[schedule]\nhours = ["00:00-12:00 UTC", "12:00-24:00 UTC"]\n'  # open whenever this runs
    more = f"[budget]\ntokens = 900\n[budget.month]\ntokens = 100000\n{hours}"
    config = write_folder(tmp_path, mock.base_url, 200, more=more)
    shared = Overrides(share_opening=True)
    totals = []
    for flags in (shared, shared, shared, Overrides()):
        summary = asyncio.run(job.run(prepare(config, flags), lambda _: None))
        assert summary.exit_code == 10
        assert ("--share-opening" in summary.resume) == flags.share_opening
        totals.append(mock.totals()["total_tokens"])
    assert 0 < totals[0] == totals[1] == totals[2] <= 900 < totals[3] <= 1800
    left = [plan_budgets(prepare(config, flags)) for flags in (shared, Overrides())]
    assert left[0]["run"]["tokens_spent"] == totals[3]
    assert left[1]["run"]["tokens_spent"] == 0
    config.write_text(config.read_text().replace(hours, ""))
    with pytest.raises(ConfigError, match="no opening hours"):
        prepare(config, shared)


def plan_budgets(ready: Prepared) -> Mapping[str, Mapping[str, float | None]]:
    return budgets(ready.config, ready.root, ready.limits())


def test_runs_before_the_opening_and_of_other_teachers_do_not_count_for_it(tmp_path: Path) -> None:
    with Journal.open(tmp_path) as journal:
        for number, (run_id, at, teacher) in enumerate(
            [
                ("before", 100.0, "t|m"),
                ("first", 200.0, "t|m"),
                ("second", 300.0, "t|m"),
                ("other", 300.0, "o|m"),
            ]
        ):
            journal.begin_run(RunRecord(run_id, at, teacher))
            journal.apply([Intent(number, bytes([number]) * 32, run_id, "t", at, 10**number, 0)])
            journal.end_run(run_id, "parked", 10, at + 1)
        charged = {
            since: compute_spent(journal, 400.0, "t|m", since)[BudgetSpan.RUN][0]
            for since in (None, 50.0, 200.0, 300.0, 301.0)
        }
    assert charged == {None: 0, 50.0: 111, 200.0: 110, 300.0: 100, 301.0: 0}


def test_runs_that_began_before_the_opening_and_were_alive_in_it_count_for_it(tmp_path: Path) -> None:
    """A run with --watch may wait for the hours. When a killed one ended is not known."""
    runs = [
        ("killed in other hours", 100.0, "killed", None),
        ("over", 200.0, "parked", 1000.0),
        ("waited", 900.0, "parked", 1200.0),
        ("killed", 950.0, "killed", None),
        ("went on", 1300.0, "parked", 1301.0),
        ("copied", 900.0, "copied", 1200.0),
    ]
    with Journal.open(tmp_path) as journal:
        for number, (run_id, at, ending, ended_at) in enumerate(runs):
            journal.begin_run(RunRecord(run_id, at, "t|m"))
            journal.apply([Intent(number, bytes([number]) * 32, run_id, "t", at, 10**number, 0)])
            if ended_at is not None:
                journal.end_run(run_id, ending, 10, ended_at)
        charged = {
            since: compute_spent(journal, 1400.0, "t|m", since)[BudgetSpan.RUN][0]
            for since in (None, 1000.0, 1250.0, 1350.0)
        }
    assert charged == {None: 0, 1000.0: 11100, 1250.0: 11000, 1350.0: 0}


def test_a_store_of_an_earlier_release_counts_with_all_that_it_spent(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher()
    run_harvest(mock, tmp_path, prompts=MANY[:10], teacher=PRICE)
    before = spent(tmp_path / "store")
    with closing(sqlite3.connect(tmp_path / "store" / "journal.db")) as connection, connection:
        connection.execute("DELETE FROM counters WHERE name GLOB 'spent.*'")
        connection.execute("DELETE FROM checks WHERE name GLOB 'counters:*'")
    assert spent(tmp_path / "store") == before


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        {"prompt_tokens": 11, "completion_tokens": 0, "total_tokens": 11},
        {"prompt_tokens": 11, "completion_tokens": 1, "total_tokens": 12},
        {"prompt_tokens": -5, "completion_tokens": -300, "total_tokens": -305},
    ],
)
def test_usage_that_is_lower_than_the_answers_hold_is_charged_by_our_own_count(
    mock_teacher: Mock, tmp_path: Path, usage: dict[str, int]
) -> None:
    mock = mock_teacher(latency_s=0.01)
    faults = [{"action": "patch", "value": {**LONG_ANSWER, "usage": usage}}]
    ended = run_harvest(mock, tmp_path, faults, prompts=MANY, teacher=PRICE, budget={"usd": 0.05})
    assert ended.fired > 0
    assert ended.exit_code == 10
    assert ended.output.startswith("budget")
    if min(usage.values()) >= 0:  # a negative count is none at all: then the reservation is charged
        assert f"fewer tokens than {ended.totals.answers:,} of its answers hold" in ended.output
    own_count = WORDS * 2 * 30 / 4  # at most a token for every four bytes, at 30 micro-dollars
    assert 5 < ended.totals.answers < 60
    assert 0 < spent(tmp_path / "store")[BudgetSpan.STORE][1] <= 50_000
    assert spent(tmp_path / "store")[BudgetSpan.STORE][1] >= ended.totals.answers * own_count / 4

"""Collect what the pages show about a store, and write the report.

The report is one self-contained HTML file; `view` serves the same parts live.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harvester.config import schedule
from harvester.config.budget_spans import BudgetSpan
from harvester.errors import RunState, StoreError
from harvester.observe.canary import read_rounds
from harvester.observe.counters import unusable_held
from harvester.observe.report import charts, figures, groups, html
from harvester.observe.report import scorecard as judged
from harvester.observe.report.answer_statistics import AnswerStatistics, ShardStatistics, statistics_of_store
from harvester.observe.report.samples import samples_view
from harvester.observe.status import current_status, read_status, replica_texts, rows_done
from harvester.observe.timeline import read_timeline
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import Totals
from harvester.store.shards.schema import Sample
from harvester.system import output_path

MOST_RUNS = 30
# Rows of a table of answers by task, tag, split or file.
GROUPS_SHOWN = 30


@dataclass(frozen=True, slots=True)
class ReportData:
    """All data of a page, read at one moment."""

    statistics: AnswerStatistics
    samples: list[Sample]
    points: list[dict[str, Any]]
    status: dict[str, Any]
    totals: Totals
    runs: list[dict[str, Any]]
    card: Mapping[str, Any] | None = None
    training: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)


def write_report(
    store: Path, out: Path, *, scorecard: Path | None = None, training: Path | None = None
) -> Path:
    """Write the report of a store to `out`, atomically.

    Args:
        scorecard: a scorecard.json to show beside the harvest.
        training: a train.jsonl, whose loss is drawn.

    Raises:
        StoreError: the store can't be read.
        ConfigError: the scorecard or the training log is missing or isn't one, or `out` can't be written.
    """
    account = gather(store, card=judged.read_scorecard(scorecard), training=judged.read_training(training))
    text = html.document(overview(account), samples_view(account.statistics, account.samples))
    output_path.folder(out.parent)
    with output_path.replacing(out, store, b"<!doctype html>") as file:
        file.write(text.encode())
    return out


def gather(
    store: Path,
    *,
    known: ShardStatistics | None = None,
    card: Mapping[str, Any] | None = None,
    training: Sequence[dict[str, Any]] = (),
) -> ReportData:
    """Read a store, also during a run; `known` keeps sealed shards' statistics between calls.

    Raises:
        StoreError, StoreCorrupt: it can't be read.
    """
    statistics, samples = statistics_of_store(store, known)
    status, totals, runs = ledger_of(store)
    points, rounds = read_timeline(store), read_rounds(store)
    return ReportData(statistics, samples, points, status, totals, runs, card, list(training), rounds)


def ledger_of(store: Path) -> tuple[dict[str, Any], Totals, list[dict[str, Any]]]:
    """Return the heartbeat with whether its process is alive, the ledger's totals, and the newest runs.

    The totals count as dead what is dead now: a row that a later run answered is not.

    Raises:
        StoreError: there is no store, or it can't be read.
    """
    if not (store / paths.JOURNAL).exists():  # a bare folder of shards: no ledger came with it
        if not any(any(folder.glob("*.parquet")) for folder in (store / paths.SHARDS, store)):
            raise StoreError(
                "no store here", place=str(store), remedy="name the folder that holds journal.db or shards/"
            )
        return read_status(store), Totals(), []
    query = "SELECT run_id, started_us, ended_us, ending, exit_code FROM runs ORDER BY run DESC LIMIT ?"
    names = ("run_id", "started_us", "ended_us", "ending", "exit_code")
    with Journal.open(store, read_only=True) as journal:
        with journal.reading() as connection:
            run_rows = connection.execute(query, (MOST_RUNS,)).fetchall()
            (dead,) = connection.execute("SELECT count(*) FROM dead").fetchone()
        runs = [dict(zip(names, row, strict=True)) | {"totals": journal.totals(row[0])} for row in run_rows]
        return current_status(store), replace(journal.totals(), dead=dead), runs


def overview(account: ReportData) -> dict[str, Any]:
    """Return the values of the page's upper part: all but the list of samples."""
    statistics = account.statistics
    course = figures.TimelineCurves(account.points)
    return {
        "title": f"Harvest of {_names(statistics, 'request_model', 1)}"
        if statistics.rows
        else "No answers yet",
        "subtitle": _subtitle(statistics),
        "state": account.status.get("state", ""),
        "made_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "bars": progress(account.status),
        "learned": account.status.get("learned") or [],
        "replicas": replica_texts(account.status),
        "tiles": _tiles(account),
        "scorecard": judged.scorecard_parts(account.card) if account.card else None,
        "training": judged.training_charts(account.training) if account.training else [],
        "charts": [
            *figures.rate_charts(course, statistics),
            *figures.answer_charts(statistics, account.totals.errors),
        ],
        "drift": _drift(account.rounds),
        "process": figures.process_charts(course) if any(len(run) > 2 for run in course.runs) else [],
        "groups": _groups(statistics),
        "runs": [_run(run, alive=bool(account.status.get("alive"))) for run in account.runs],
        "provenance": _provenance(statistics),
    }


def progress(status: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return progress bars of rows and budget; widths in percent."""
    bars = []
    total = status.get("rows_total") or 0
    if total:
        done = rows_done(status)
        bars.append(_bar("rows", done, total, f"{done:,} of {total:,}"))
    budget = status.get("budget") or {}
    for name, say in (("microusd", lambda v: charts.dollars(v / 1e6)), ("tokens", charts.compact)):
        ceiling, spent = budget.get(name), budget.get(f"{name}_spent") or 0
        if ceiling:
            bars.append(_bar("budget", spent, ceiling, f"{say(spent)} of {say(ceiling)}"))
    for span, budget in (status.get("budgets") or {}).items():
        for name, say in (("microusd", lambda v: charts.dollars(v / 1e6)), ("tokens", charts.compact)):
            ceiling, spent = budget.get(name), budget.get(f"{name}_spent") or 0
            if ceiling and span != BudgetSpan.RUN:
                text = f"{say(spent)} of {say(ceiling)}, {say(budget.get(f'{name}_left') or 0)} left"
                bars.append(_bar(f"budget, {span}", spent, ceiling, text))
    return bars


def _bar(name: str, done: float, total: float, text: str) -> dict[str, str]:
    share = min(1.0, done / total)
    return {"name": name, "width": f"{share * 100:.2f}", "said": f"{text} ({share:.1%})"}


def _names(statistics: AnswerStatistics, fact: str, most: int) -> str:
    return ", ".join(name for name, _ in statistics.facts[fact].most_common(most))


def _subtitle(statistics: AnswerStatistics) -> str:
    if not statistics.rows:
        return "answers will appear here"
    models = _names(statistics, "request_model", 3)
    mock = " (mock teacher: these rows are marked as not real)" if statistics.mock else ""
    return f"{statistics.rows:,} answers from {models}{mock}"


def _groups(statistics: AnswerStatistics) -> list[dict[str, Any]]:
    """The largest groups of each kind that divides the answers."""
    return [
        {
            "kind": kind,
            "rows": [(name, *groups.cells(group)) for name, group in largest[:GROUPS_SHOWN]],
            "further": f"{len(largest[GROUPS_SHOWN:]):,}",
        }
        for kind in groups.KINDS
        if statistics.by_group.has_several_groups(kind)
        for largest in [statistics.by_group.largest(kind)]
    ]


def _provenance(statistics: AnswerStatistics) -> list[tuple[str, str]]:
    rows = [
        (
            fact.replace("_", " "),
            ", ".join(f"{name or '(none)'} ({n:,})" for name, n in counts.most_common(6)),
        )
        for fact, counts in statistics.facts.items()
        if counts
    ]
    return [*rows, ("mock", f"{statistics.mock:,} of {statistics.rows:,}")] if statistics.rows else rows


def _tiles(account: ReportData) -> list[dict[str, Any]]:
    statistics, status, totals = account.statistics, account.status, account.totals
    live = status.get("state") in list(RunState)
    tiles = [_tile("answers stored", f"{max(statistics.rows, totals.held):,}")]
    rates, eta = status.get("rates") or {}, status.get("eta_s") or {}
    if live and rates:
        tiles.append(_tile("requests a minute", f"{rates.get('requests_per_minute', 0):,.0f}"))
    if live and eta:
        tiles.append(_tile("time left", figures.between(eta["low"], eta["high"])))
    done = (status.get("done_at") or {}).get("likely")
    if live and done is not None:
        tiles.append(_tile("done, likely (UTC)", f"{schedule.moment(done):%b %d, %H:%M}"))
    tiles.append(
        _tile("tokens in and out", charts.compact(statistics.input_tokens + statistics.output_tokens))
    )
    tiles.append(_tile("cost", charts.dollars(totals.cost_microusd / 1e6 or statistics.cost_microusd / 1e6)))
    if canaries := status.get("canary_microusd_ever"):
        tiles.append(_tile("cost of canaries", charts.dollars(canaries / 1e6)))
    projected = status.get("cost_projected_microusd") or {}
    if live and projected:
        tiles.append(_tile("cost of this run, projected", charts.dollars(projected["likely"] / 1e6)))
    if totals.attempts:
        refused = totals.errors.get("rate_limited", 0)
        tiles.append(_tile("attempts sent", f"{totals.attempts:,}"))
        tiles.append(
            _tile(
                "refused for the rate", f"{refused / totals.attempts:.1%}", bad=refused * 20 > totals.attempts
            )
        )
    most, bad = unusable_held(totals.held_outcomes, totals.held)
    if most and not bad:
        bad = {"at most unusable": most}
    for name, count in bad.items():
        tiles.append(_tile(f"{name} answers", f"{count:,}", bad=True))
    waiting = status.get("batches") or {}
    if waiting.get("batches"):
        age = figures.duration(max(0.0, time.time() - waiting["oldest_at"]))
        tiles.append(_tile("rows in batches", f"{waiting['rows']:,} in {waiting['batches']:,}"))
        tiles.append(_tile("age of the oldest batch", age))
        tiles.append(_tile("batches may cost", charts.dollars(waiting["reserved_microusd"] / 1e6)))
    tiles.append(_tile("failed rows", f"{totals.dead:,}", bad=totals.dead > 0))
    billed = totals.possibly_billed
    tiles.append(_tile("attempts possibly billed", f"{billed:,}", bad=totals.possibly_billed_microusd > 0))
    return tiles


def _tile(name: str, value: str, *, bad: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "bad": bad}


def _drift(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The canaries' chart, and every change they met; None where none were asked."""
    if not rounds:
        return None
    changes = [
        {
            "at": f"{datetime.fromtimestamp(change['at'], UTC):%Y-%m-%d %H:%M}",
            "round": f"{change['round']:,}",
            "said": "; ".join(change["changes"]),
        }
        for change in rounds
        if change.get("changes")
    ]
    verdict = "One round so far: there is nothing to compare it with yet."
    if len(rounds) > 1:
        verdict = (
            f"In {len(rounds):,} rounds it named the same model and build, and its answers stayed within the "
            "tolerance."
        )
    return {"chart": figures.drift_chart(rounds), "changes": changes[::-1], "verdict": verdict}


def _run(run: Mapping[str, Any], *, alive: bool) -> dict[str, str]:
    totals: Totals = run["totals"]
    is_alive = alive and not run["ending"]
    ended_us = time.time() * 1e6 if is_alive else run["ended_us"]
    started = datetime.fromtimestamp(run["started_us"] / 1e6, UTC)
    return {
        "run_id": run["run_id"],
        "started": f"{started:%Y-%m-%d %H:%M}",
        "took": figures.duration((ended_us - run["started_us"]) / 1e6) if ended_us else "",
        "ending": "under way" if is_alive else run["ending"] or "none: it was killed",
        "exit_code": "" if run["exit_code"] is None else str(run["exit_code"]),
        "attempts": f"{totals.attempts:,}",
        "answers": f"{totals.answers:,}",
        "dead": f"{totals.dead:,}",
        "cost": charts.dollars(totals.cost_microusd / 1e6),
    }

"""Keep the ledger that budgets read: what the attempts of a run were charged, by day.

The counters `spent.DAY.tokens` and `spent.DAY.microusd` of a run hold it; DAY is a UTC date. An answer counts
with what the budget of its run was charged for it. An attempt that was possibly billed counts with its
reservation: when it fails, or when its run ends without an outcome for it. Purging changes none of this.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime

import orjson

from harvester.store.journal.sqlite import has_table

# Tokens and micro-dollars.
Amounts = tuple[int, int]

# Ending of a run that was killed before it could write one.
KILLED = "killed"
# Ending of a run of another store some of whose answers were copied here.
COPIED_ENDING = "copied"

_PREFIX = "spent."


def counter_names(at: float) -> tuple[str, str]:
    """Return the counters of the day of `at`, in Unix seconds: of tokens and of micro-dollars."""
    day = datetime.fromtimestamp(at, UTC).date().isoformat()
    return f"{_PREFIX}{day}.tokens", f"{_PREFIX}{day}.microusd"


def charges_at_end(connection: sqlite3.Connection, run: int) -> Mapping[str, int]:
    """Return, by counter, what the end of run number `run` adds: reservations of attempts without an outcome.

    A run that an earlier release began has no figures by day; all that it spent is added too.
    """
    is_of_this_release = bool(_by_day(connection, run))
    charges: Counter[str] = Counter()
    query = "SELECT at_us, reserved_tokens, reserved_microusd, code FROM intents WHERE run = ?"
    for at_us, tokens, microusd, code in connection.execute(query, (run,)):
        if code is None or not is_of_this_release:
            charges.update(dict(zip(counter_names(at_us / 1e6), (tokens, microusd), strict=True)))
    if not is_of_this_release:
        charges.update(_answers_of_earlier_release(connection, run))
    return charges


def spent(
    connection: sqlite3.Connection, *, since: float | None = None, run_ids: Collection[str] | None = None
) -> Amounts:
    """Return the tokens and micro-dollars that a store was charged, with those of attempts in flight.

    Args:
        since: first moment of a UTC day in Unix seconds; None for all time.
        run_ids: only these runs; None for all.
    """
    first_day = "" if since is None else datetime.fromtimestamp(since, UTC).date().isoformat()
    sums = {".tokens": 0, ".microusd": 0}
    for run, run_id, ending in connection.execute("SELECT run, run_id, ending FROM runs").fetchall():
        if run_ids is not None and run_id not in run_ids:
            continue
        charges = Counter(_by_day(connection, run))
        if not charges or not ending:
            charges.update(charges_at_end(connection, run))
        charges.update(_held_by_batches(connection, run))
        for name, amount in charges.items():
            if name.removeprefix(_PREFIX) >= first_day:
                sums[name[name.rindex(".") :]] += amount
    return sums[".tokens"], sums[".microusd"]


def _held_by_batches(connection: sqlite3.Connection, run: int) -> dict[str, int]:
    """Return what rows that wait in batches of this run may cost, on the day the batch was sent."""
    charges: Counter[str] = Counter()
    if has_table(connection, "batch_rows"):
        query = (
            "SELECT at_us, sum(reserved_tokens), sum(reserved_microusd) FROM batch_rows JOIN batches"
            " USING (batch) WHERE run = ? GROUP BY batch"
        )
        for at_us, *amounts in connection.execute(query, (run,)):
            charges.update(dict(zip(counter_names(at_us / 1e6), amounts, strict=True)))
    return charges


def _by_day(connection: sqlite3.Connection, run: int) -> dict[str, int]:
    query = "SELECT name, value FROM counters WHERE run = ? AND name GLOB ?"
    return dict(connection.execute(query, (run, f"{_PREFIX}*")))


def _answers_of_earlier_release(connection: sqlite3.Connection, run: int) -> dict[str, int]:
    """Return what the answers of a run without figures by day were charged, on the day it was last alive."""
    (last_us,) = connection.execute(
        "SELECT coalesce(ended_us, started_us) FROM runs WHERE run = ?", (run,)
    ).fetchone()
    counts = dict(connection.execute("SELECT name, value FROM counters WHERE run = ?", (run,)))
    tokens = counts.get("input_tokens", 0) + counts.get("output_tokens", 0)
    return dict(zip(counter_names(last_us / 1e6), (tokens, counts.get("cost_microusd", 0)), strict=True))


def runs_to_continue(
    connection: sqlite3.Connection, teacher_id: str, since: float | None = None
) -> list[str]:
    """Return the runs that a run of this teacher goes on from: its last runs, as long as they were killed.

    A run that is active, or was killed and is not yet known to be, has no ending and is one of them.

    Args:
        since: in Unix seconds; the teacher's runs that began then or later, or ended after it, count too,
            however they ended, and those directly before them that were killed.
    """
    since_us = None if since is None else int(since * 1e6)
    query = "SELECT run_id, started_us, ended_us, ending, lineage_json FROM runs ORDER BY run DESC"
    run_ids, is_next_counted = [], True
    for run_id, started_us, ended_us, ending, lineage in connection.execute(query):
        if _teacher(lineage) != teacher_id or ending == COPIED_ENDING:
            continue
        is_killed = ending in {"", KILLED}
        is_since = since_us is not None and (started_us >= since_us or (ended_us or 0) > since_us)
        is_next_counted = is_since or (is_killed and is_next_counted)
        if is_next_counted:
            run_ids.append(run_id)
        elif since_us is None:
            break
    return run_ids


def runs_up_to(connection: sqlite3.Connection, run_id: str) -> list[str]:
    """Return a run, however it ended, and those of its teacher directly before it that were killed."""
    runs = _runs_backwards(connection)
    for each, _, lineage in runs:
        if each == run_id:
            return [run_id, *_last_killed(runs, _teacher(lineage))]
    return []


def _runs_backwards(connection: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    """Yield id, ending and lineage of each run, the last one first."""
    yield from connection.execute("SELECT run_id, ending, lineage_json FROM runs ORDER BY run DESC")


def _last_killed(runs: Iterable[tuple[str, str, str]], teacher_id: str) -> list[str]:
    """Return the first of these runs with this teacher, as long as they were killed."""
    run_ids = []
    for run_id, ending, lineage in runs:
        if _teacher(lineage) != teacher_id or ending == COPIED_ENDING:
            continue
        if ending not in {"", KILLED}:
            break
        run_ids.append(run_id)
    return run_ids


def _teacher(lineage_json: str) -> str:
    try:
        return str(orjson.loads(lineage_json).get("teacher_id", ""))
    except (orjson.JSONDecodeError, AttributeError):  # damaged: `harvester verify` reports it
        return ""

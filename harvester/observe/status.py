"""Read and write status.json, the heartbeat file of a store; describe it for people and health probes.

Loads neither httpx nor pyarrow, so that it answers at once beside a store of a million rows.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvester.config import schedule
from harvester.config.budget_spans import BudgetSpan
from harvester.errors import COMPLETE_ENDINGS, RunState
from harvester.observe.counters import are_texts_repeated, judged_text, several_text, unusable, unusable_share
from harvester.store import paths
from harvester.store.journal.batches import waiting_in_batches
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held, read_holder
from harvester.store.journal.merged_from import merged_from
from harvester.store.maintain.bill import compute_bill, compute_canary_bill, compute_spent
from harvester.store.pauses import load
from harvester.system import own_files
from harvester.system.counted import counted
from harvester.system.process_state import STANDING, process_state, standing_text

# Most bytes of status.json that are read; it has some 5 KiB.
MAX_STATUS_BYTES = 16 << 20
# At most this many of the last complaints are shown.
COMPLAINTS_SHOWN = 3
# At most this many sources of a merged store are shown.
SOURCES_SHOWN = 12
# A heartbeat further ahead of this clock than this was written before the clock was set back.
AHEAD_S = 5.0
# A live process writes every two seconds; if its heartbeat is older than this, its state is `hung`.
HUNG_AFTER_S = 60.0


def read_status(store: Path) -> dict[str, Any]:
    """Return the heartbeat file of a store, without what it can't mean; empty when no run has written one."""
    status, _ = _read_status(store)
    return status


def _read_status(store: Path) -> tuple[dict[str, Any], str]:
    """Return the heartbeat, and what is wrong with its file: "" for nothing, or where there is none."""
    from harvester.observe.status_schema import validated_status

    try:
        loaded = json.loads(own_files.read_text(store / paths.STATUS, MAX_STATUS_BYTES))
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, str(error.strerror or error)
    except (ValueError, RecursionError):
        return {}, "is no JSON"
    return (validated_status(loaded), "") if isinstance(loaded, dict) else ({}, "is no JSON object")


def write_status(store: Path, status: Mapping[str, Any]) -> None:
    """Replace the heartbeat file atomically. No fsync: after a power cut an older heartbeat is as true."""
    with own_files.replacing(store / paths.STATUS) as file:
        file.write(json.dumps(status, indent=2).encode() + b"\n")


def current_status(store: Path, live: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the heartbeat, whether its process is alive or hangs, and the ledger's totals.

    Args:
        live: what the job itself answered just now over its socket; None when it did not answer.

    Raises:
        StoreError: no store here, or one that can't be read.
    """
    from harvester.observe.status_schema import validated_status

    alive = is_held(store)
    with Journal.open(store, read_only=True) as journal:
        totals, bill = journal.totals(), compute_bill(journal, alive=alive)
        holds = load(journal)
        spent = {} if alive else compute_spent(journal, time.time())
        with journal.reading() as connection:
            waiting = waiting_in_batches(connection)
            merged = merged_from(connection)
    written, fault = _read_status(store)
    status = {**written, **validated_status(live or {})}
    if fault and not live:
        status["status_fault"] = fault
    status = with_process(store, status, alive=alive, answered=live is not None)
    if not alive:
        status["holds"] = holds
        status["budgets"] = _budgets_now(status.get("budgets") or {}, spent)
    if merged is not None:
        status["merged"] = merged.facts()
    return {
        **status,
        "store": str(store),
        "held": totals.held,
        "held_outcomes": totals.held_outcomes,
        "billed": bill.billed,
        "batches": waiting.facts(),
        "possibly_billed": len(bill.possibly_billed),
        "possibly_billed_microusd": bill.possibly_billed_microusd,
        "without_outcome": sum(not attempt.code for attempt in bill.possibly_billed),
        "cost_microusd_ever": bill.billed_microusd,
        **_canary_ledger(store, alive=alive),
    }


def with_process(
    folder: Path, status: Mapping[str, Any], *, alive: bool, answered: bool = False
) -> dict[str, Any]:
    """Return a status with how old it is, and what the process does that writes it.

    A process that has started and written none yet is as old as its start.

    Args:
        folder: of a store or a fleet, whose lock the process holds while it is `alive`.
        answered: the process itself has answered just now.
    """
    holder = read_holder(folder / paths.LOCK) if alive else {}
    last = status.get("updated_at", 0.0)
    begun_at = holder.get("started_at")
    if isinstance(begun_at, int | float) and holder.get("pid") != status.get("pid"):
        last = max(last, begun_at)
    age_s = round(time.time() - last, 1)
    found = {**status, "alive": alive, "heartbeat_age_s": age_s}
    if alive:
        found["process"] = process_state(holder)
        if not answered and not -AHEAD_S <= age_s <= HUNG_AFTER_S:
            found["state"] = "hung"
    elif status.get("state") in list(RunState):
        found["state"] = "died"
    return found


def _canary_ledger(store: Path, *, alive: bool) -> dict[str, int]:
    bill = compute_canary_bill(store, alive=alive)
    return (
        {}
        if bill is None
        else {
            "canary_billed": bill.billed,
            "canary_microusd_ever": bill.billed_microusd,
            "canary_possibly_billed": len(bill.possibly_billed),
            "canary_possibly_billed_microusd": bill.possibly_billed_microusd,
        }
    )


def can_answer(store: Path) -> bool:
    """Whether the process that holds the store can answer on its socket: a stopped one can't."""
    return process_state(read_holder(store / paths.LOCK)) not in STANDING


def unhealthy_reason(status: Mapping[str, Any], max_age_s: float) -> str:
    """Return why a health probe should fail, "" for a complete run or one with a fresh heartbeat."""
    if status.get("state") in COMPLETE_ENDINGS:
        return ""
    age = f"last {_heartbeat_age(status)}"
    if not status.get("alive"):
        unknown = "how its last run ended is not known" if status.get("held") else "never ran"
        if is_untouched_merge(status):
            unknown = "no run has been in this merged store"
        return f"no run is active: {status.get('state', unknown)}, {age}"
    # A stamp of the future was written before the clock was set back: how long ago is unknown.
    stale = not -AHEAD_S <= status["heartbeat_age_s"] <= max_age_s
    stale = stale or status.get("process") in STANDING
    return f"the run hangs ({status.get('process') or 'its heartbeat is too old'}), {age}" if stale else ""


def remedy_of(status: Mapping[str, Any]) -> str:
    """Return what can be done about a run for which `unhealthy_reason` has a reason."""
    standing = standing_text(str(status.get("process", "")), status.get("pid", "?"))
    if standing:
        return standing
    if status.get("alive"):
        return (
            "look at its log and its disk; `harvester stop` or a signal ends it, `harvester run` resumes it"
        )
    if is_untouched_merge(status) or not (status.get("run_id") or status.get("held")):
        return "`harvester run` with its harvest.toml starts one"
    return "`harvester run` with its harvest.toml resumes it; what was stored is kept"


def _heartbeat_age(status: Mapping[str, Any]) -> str:
    if not status.get("updated_at"):
        return "heartbeat never"
    age = status.get("heartbeat_age_s", 0.0)
    return f"heartbeat {age:.0f} s ago" if age >= -AHEAD_S else f"heartbeat {-age:.0f} s ahead of this clock"


def status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the heartbeat in words."""
    if fault := status.get("status_fault"):
        where = Path(status.get("store", "")) / paths.STATUS
        return [f"status    {where} {fault}: move it away; the next run writes it again", *_ledger(status)]
    if not status.get("run_id"):
        return _without_heartbeat(status)
    lines = [_headline(status)]
    if status.get("why") and not status.get("alive"):
        lines.append(f"why       {status['why']}")
    if text := standing_text(str(status.get("process", "")), status.get("pid", "?")):
        lines.append(f"{status['process']:<9} {text}")
    lines += [*_pace(status), *_money(status)]
    if status.get("waiting"):
        lines.append(f"waiting   {status['waiting']}")
    lines += [f"learned   {text}" for text in status.get("learned") or []]
    lines += [f"address   {text}" for text in replica_texts(status)]
    lines += [f"shared    {text}" for text in _shared_texts(status)]
    if text := several_text(status):
        lines.append(f"n         {text}")
    if text := judged_text(status):
        lines.append(f"accept    {text}")
    if status.get("errors"):
        errors = ", ".join(f"{code} {count:,}" for code, count in sorted(status["errors"].items()))
        lines.append(f"errors    {errors}   (`harvester explain CODE`)")
    lines += _unusable(status)
    lines += _batches(status)
    lines += _ledger(status)
    lines += _odd_answers(status)
    lines += _canaries(status)
    lines += _mirror(status)
    lines += [f"complaint {complaint}" for complaint in status.get("complaints", [])[-COMPLAINTS_SHOWN:]]
    if status.get("holds") and not status.get("alive", True):
        lines.append(f"on hold   the next run sends nothing: {'; '.join(status['holds'].values())}")
    lines.append(_process_text(status))
    return lines


def _odd_answers(status: Mapping[str, Any]) -> list[str]:
    lines = []
    if status.get("usage_corrected"):
        lines.append(
            f"usage     {status['usage_corrected']:,} answers report fewer tokens than they hold; charged by "
            "our own count"
        )
    if are_texts_repeated(status.get("repeated_texts") or 0, status.get("answers_stored") or 0):
        lines.append(f"texts     {status['repeated_texts']:,} answers have the text of one to another prompt")
    if status.get("repeated_ids"):
        lines.append(f"ids       {status['repeated_ids']:,} answers carry the id of an earlier one")
    return lines


def _without_heartbeat(status: Mapping[str, Any]) -> list[str]:
    """Return what can be said where status.json is not there: a run may have been here all the same."""
    lines = ["no run has written a status here yet"]
    if status.get("merged"):
        lines = _merged_lines(status)
    if is_untouched_merge(status):
        lines += _ledger(status)
    elif status.get("held"):
        lines += [
            f"status    {paths.STATUS} is gone, or says nothing; the next run writes it",
            *_ledger(status),
        ]
    return [*lines, _process_text(status)] if status.get("alive") else lines


def is_untouched_merge(status: Mapping[str, Any]) -> bool:
    """Whether `harvester merge` made the store and no run has been in it: then it has no status.json."""
    merged = status.get("merged")
    return merged is not None and not merged["has_run_since"] and not status.get("run_id")


def _merged_lines(status: Mapping[str, Any]) -> list[str]:
    """Say what a merged store was made of, and where that was."""
    merged = status["merged"]
    held, stores = counted(status.get("held", 0), "answer"), merged["stores"]
    at = schedule.here(merged["at"])
    since = "a run was here since" if merged["has_run_since"] else "no run has been here since"
    if not stores:
        return [f"a merged store with {held}; where its sources were was not noted"]
    lines = [
        f"a merged store with {held}, of {counted(len(stores), 'store')} on {at}; {since}",
        *(f"source    {store}" for store in stores[:SOURCES_SHOWN]),
    ]
    if len(stores) > SOURCES_SHOWN:
        lines.append(f"source    and {len(stores) - SOURCES_SHOWN:,} more; --json lists all")
    return lines


def _headline(status: Mapping[str, Any]) -> str:
    done, total = rows_done(status), status.get("rows_total", 0)
    share = f" ({done / total:.1%})" if total else ""
    return (
        f"{status.get('state', '?')}: {done:,} of {counted(total, 'row')}{share}; "
        f"{counted(status.get('answers_stored', 0), 'answer')}, {status.get('from_cache', 0):,} already "
        f"stored, {status.get('dead', 0):,} failed"
    )


def rows_done(status: Mapping[str, Any]) -> int:
    """Return the number of rows that have an ending."""
    return sum(status.get(name, 0) for name in ("from_cache", "duplicates", "answers_stored", "dead"))


def _pace(status: Mapping[str, Any]) -> list[str]:
    if status.get("state") not in [*RunState, "hung"]:
        return []
    lines = [
        f"rate      {rate_text(status)}",
        f"in flight {status.get('in_flight', 0):,} of a window of {status.get('window', 0):,}",
    ]
    eta = status.get("eta_s")
    if eta:
        lines.append(
            f"left      about {status.get('tokens_left', {}).get('likely', 0):,.0f} tokens: "
            f"{span(eta['low'])} to {span(eta['high'])} of work"
        )
    return [*lines, *(f"{name:<9} {text}" for name, text in calendar(status))]


def calendar(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return when it will be done, its hours counted in, and when they end; in the zone of this machine."""
    lines = []
    if done := status.get("done_at"):
        low, high = (schedule.here(done[side]) if done[side] is not None else "" for side in ("low", "high"))
        lines.append(("done", f"{low} to {high or 'more than a year from now'}" if low else "in over a year"))
    closes, deadline = status.get("closes_at"), status.get("finish_by")
    ends = [f"close {schedule.here(closes)}"] if closes is not None and closes != deadline else []
    ends += [f"deadline {schedule.here(deadline)}"] if deadline is not None else []
    return [*lines, ("hours", ", ".join(ends))] if ends else lines


def rate_text(status: Mapping[str, Any]) -> str:
    """Return the rates with their shares of the limits, and the share of requests that are refused."""
    rates, limits = status.get("rates") or {}, status.get("limits") or {}
    parts = []
    for unit in ("requests", "tokens"):
        rate = rates.get(f"{unit}_per_minute", 0.0)
        parts.append(f"{rate:,.0f} {unit}/min{_of(rate, limits.get(f'{unit}_per_minute'))}")
    return f"{', '.join(parts)}, {status.get('refused_share', 0):.1%} refused"


def _of(rate: float, limit: float | None) -> str:
    return f" of {limit:,.0f} ({rate / limit:.0%})" if limit else ""


def _money(status: Mapping[str, Any]) -> list[str]:
    text = f"cost      ${status.get('cost_microusd', 0) / 1e6:.4f} this run"
    if canaries := (status.get("canary") or {}).get("cost_microusd"):
        text += f" and ${canaries / 1e6:.4f} for canaries"
    projected = status.get("cost_projected_microusd")
    if projected and status.get("state") in list(RunState):
        text += f", ${projected['low'] / 1e6:.4f} to ${projected['high'] / 1e6:.4f} projected"
    ever = status.get("cost_microusd_ever", 0)
    if ever != status.get("cost_microusd", 0):
        text += f" (${ever / 1e6:.4f} of all runs)"
    return [text, *(f"budget    {text}" for text in budget_texts(status.get("budgets") or {}))]


def budget_texts(budgets: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """Return a line for each ceiling: its span, what was spent and what is left.

    Args:
        budgets: by span, as `budgets` in status.json.
    """
    texts = []
    for name, budget in budgets.items():
        span_text = _BUDGET_SPANS.get(name, name)
        for unit, amount in (("microusd", _dollars), ("tokens", _tokens)):
            ceiling, spent, left = (budget.get(f"{unit}{part}") for part in ("", "_spent", "_left"))
            if ceiling is not None:
                left = max(0, ceiling - (spent or 0)) if left is None else left
                texts.append(
                    f"{span_text}: {amount(left)} left of {amount(ceiling)}, {amount(spent or 0)} spent"
                )
    return texts


_BUDGET_SPANS = {
    "run": "this run",
    "store": "this store",
    "day": "this day (UTC)",
    "month": "this month (UTC)",
}


def _dollars(microusd: float) -> str:
    return f"${microusd / 1e6:,.4f}"


def _tokens(count: float) -> str:
    return f"{count:,.0f} tokens"


def _budgets_now(
    budgets: Mapping[str, Mapping[str, float | None]], spent: Mapping[BudgetSpan, tuple[int, int]]
) -> dict[str, dict[str, float | None]]:
    """Return the budgets of a run that has ended as they are now, by what the ledger says was spent."""
    now: dict[str, dict[str, float | None]] = {}
    for name, budget in budgets.items():
        now[name] = dict(budget)
        if name == BudgetSpan.RUN or name not in list(BudgetSpan):
            continue
        span_of_budget = BudgetSpan(name)
        for unit, amount in zip(("tokens", "microusd"), spent[span_of_budget], strict=True):
            ceiling = budget.get(unit)
            now[name][f"{unit}_spent"] = amount
            now[name][f"{unit}_left"] = None if ceiling is None else max(0, ceiling - amount)
        ends_at = span_of_budget.end(time.time())
        now[name]["ends_at"] = ends_at if math.isfinite(ends_at) else None
    return now


def _batches(status: Mapping[str, Any]) -> list[str]:
    """Batches that have not ended: how many, how old, what they hold, what they may cost."""
    waiting = status.get("batches") or {}
    if not waiting.get("batches"):
        return []
    states: dict[str, int] = {}
    for batch in waiting["open"]:
        name = batch["status"] or batch["state"]
        states[name] = states.get(name, 0) + 1
    words = ", ".join(f"{count:,} {name}" for name, count in states.items())
    age = span(max(0.0, time.time() - waiting["oldest_at"]))
    return [
        f"batches   {waiting['batches']:,} with {counted(waiting['rows'], 'row')}, the oldest {age} old "
        f"({words}); cost up to ${waiting['reserved_microusd'] / 1e6:.4f}"
    ]


def replica_texts(status: Mapping[str, Any]) -> list[str]:
    """Say of each of several addresses how it does, and why it gets no rows where it gets none."""
    texts = []
    for replica in status.get("replicas") or []:
        latency = replica.get("latency_s")
        parts = [
            f"{replica.get('answers_per_minute') or 0:,.0f} answers/min",
            f"in flight {replica.get('in_flight', 0):,} of a window of {replica.get('window', 0):,}",
            *([] if latency is None else [f"{latency:,.1f} s each"]),
        ]
        if share := replica.get("unusable_share"):
            parts.append(f"{share:.1%} unusable")
        if replica.get("taken_back"):
            parts.append(f"{replica['taken_back']:,} taken back")
        why = f" ({replica['why']})" if replica.get("why") else ""
        texts.append(f"{replica.get('endpoint', '')}: {replica.get('state', '?')}{why}, {', '.join(parts)}")
    return texts


def _shared_texts(status: Mapping[str, Any]) -> list[str]:
    """Say which other harvests share the limits, for each address; nothing once the run has ended."""
    texts = []
    for lease in (status.get("shared") or []) if status.get("state") in set(RunState) else []:
        others = [
            f"{other.get('config') or 'a harvest'} (pid {other.get('pid', 0):.0f}) has "
            f"{other.get('share', 0.0):.0%}"
            for other in lease.get("others") or []
        ]
        texts.append(
            f"the limits of {lease.get('endpoint', '')}: {lease.get('share', 0.0):.0%} are ours; "
            f"{'; '.join(others)}"
        )
    return texts


def _ledger(status: Mapping[str, Any]) -> list[str]:
    if "billed" not in status:  # the heartbeat alone, without the journal's totals
        return []
    return [
        f"ledger    {counted(status['held'], 'answer')} stored, {status['billed']:,} billed for "
        f"${status['cost_microusd_ever'] / 1e6:.4f}, {status['possibly_billed']:,} possibly billed "
        f"(${status['possibly_billed_microusd'] / 1e6:.4f} reserved; `harvester verify` lists them)"
    ]


def _unusable(status: Mapping[str, Any]) -> list[str]:
    """Answers that are empty, invalid, filtered, refused or unknown: in the store, or else in this run."""
    of_store = status.get("held_outcomes")
    counts = status.get("outcomes") or {} if of_store is None else of_store
    share, split = unusable_share(counts, None if of_store is None else status.get("held"))
    if not share:
        return []
    text = f"{share} answers" + (f": {split}" if split else "")
    return [f"unusable  {text}   (`harvester run CONFIG --retry {','.join(unusable(counts))}`)"]


def _canaries(status: Mapping[str, Any]) -> list[str]:
    canary, lines = status.get("canary") or {}, []
    failed = canary.get("stopped") or canary.get("missed")
    if canary:
        text = canary.get("said") or ("no change so far" if failed else "the teacher answers as before")
        lines.append(
            f"canaries  {canary.get('rounds', 0):,} rounds, {canary.get('changes', 0):,} changes: {text}"
        )
    if failed:
        what = "stopped" if canary.get("stopped") else "the last round failed, the next one tries again"
        lines.append(f"canaries  {what}: {failed}")
    if status.get("canary_billed") or status.get("canary_possibly_billed"):
        lines.append(
            f"canaries  {status['canary_billed']:,} answers billed for "
            f"${status['canary_microusd_ever'] / 1e6:.4f} beside the rows, "
            f"{status['canary_possibly_billed']:,} possibly billed "
            f"(${status['canary_possibly_billed_microusd'] / 1e6:.4f} reserved; `harvester verify "
            f"{status.get('store', 'STORE')}/{paths.CANARY}` lists them)"
        )
    return lines


def _mirror(status: Mapping[str, Any]) -> list[str]:
    mirror = status.get("mirror") or {}
    if not mirror:
        return []
    text = f"{mirror.get('mirrored', 0):,} of {mirror.get('shards', 0):,} shards at {mirror.get('url', '')}"
    if failures := mirror.get("failures"):
        text += f"; {counted(failures, 'try', 'tries')} failed: {mirror.get('message', '')}"
    return [f"mirror    {text}"]


def _process_text(status: Mapping[str, Any]) -> str:
    who = f"pid {status.get('pid', '?')} on {status.get('host', '?')}"
    age = _heartbeat_age(status)
    if not status.get("alive"):
        return f"process   none (was {who}), {age}"
    state = status.get("process")
    return f"process   {who}{f', {state}' if state else ''}, {age}"


def span(seconds: float) -> str:
    """Return seconds as text, in the largest fitting unit."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"

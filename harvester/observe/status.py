"""Read and write status.json, the heartbeat file of a store; describe it for people and health probes.

Loads neither httpx nor pyarrow, so that it answers at once beside a store of a million rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvester.config import schedule
from harvester.errors import Ending, RunState
from harvester.observe.status_schema import validated_status
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.journal.lock import is_held, read_holder
from harvester.store.maintain.bill import compute_bill, compute_canary_bill
from harvester.store.pauses import load

COMPLAINTS_SAID = 3
_STANDING_BY_LETTER = {"T": "stopped", "t": "traced", "Z": "zombie"}
_STANDING = frozenset(_STANDING_BY_LETTER.values())
# A heartbeat further ahead of this clock than this was written before the clock was set back.
AHEAD_S = 5.0
# A live process writes every two seconds; if its heartbeat is older than this, its state is `hung`.
HUNG_AFTER_S = 60.0


def read_status(store: Path) -> dict[str, Any]:
    """The heartbeat file of a store, without what it can't mean; empty when no run has written one."""
    try:
        loaded = json.loads((store / paths.STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return validated_status(loaded) if isinstance(loaded, dict) else {}


def write_status(store: Path, status: Mapping[str, Any]) -> None:
    """Replace the heartbeat file atomically. No fsync: after a power cut an older heartbeat is as true."""
    hidden = store / f".{paths.STATUS}.tmp"
    hidden.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")
    hidden.replace(store / paths.STATUS)


def status(store: Path, live: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The heartbeat, whether its process lives or hangs, and the ledger's totals.

    Args:
        live: what the job itself said just now over its socket; None when it did not answer.

    Raises:
        StoreError: no journal here, or one that can't be read.
    """
    alive = is_held(store)
    with Journal.open(store, read_only=True) as journal:
        held, bill = journal.totals().answers, compute_bill(journal, alive=alive)
        holds = load(journal)
    found = {**read_status(store), **validated_status(live or {})}
    found["heartbeat_age_s"] = round(time.time() - found.get("updated_at", 0.0), 1)
    if alive:
        holder = read_holder(store / paths.LOCK)
        found["process"] = _process(holder)
        if live is None and not -AHEAD_S <= found["heartbeat_age_s"] <= HUNG_AFTER_S:
            found["state"] = "hung"
    else:
        found["holds"] = holds
        if found.get("state") in list(RunState):
            found["state"] = "died"
    return {
        **found,
        "alive": alive,
        "store": str(store),
        "held": held,
        "billed": bill.billed,
        "possibly_billed": len(bill.possibly_billed),
        "possibly_billed_microusd": bill.possibly_billed_microusd,
        "without_outcome": sum(not one.code for one in bill.possibly_billed),
        "cost_microusd_ever": bill.billed_microusd,
        **_canary_ledger(store, alive=alive),
    }


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
    return _process(read_holder(store / paths.LOCK)) not in _STANDING


def _process(holder: Mapping[str, Any]) -> str:
    """State of the holder by proc(5): "stopped" after SIGSTOP; "" on another host or without /proc."""
    if holder.get("host") != os.uname().nodename:
        return ""
    try:
        line = Path(f"/proc/{int(holder['pid'])}/stat").read_text(encoding="utf-8", errors="replace")
    except (OSError, KeyError, TypeError, ValueError):
        return ""
    letter = line.rpartition(")")[2].split()[0]
    return {**_STANDING_BY_LETTER, "D": "waits for the disk"}.get(letter, "runs")


def unhealthy_reason(found: Mapping[str, Any], max_age_s: float) -> str:
    """Why a health probe should fail, "" when it shouldn't: complete, or alive with a fresh heartbeat."""
    if found.get("state") == Ending.COMPLETE:
        return ""
    age = f"last {_beat(found)}"
    if not found.get("alive"):
        return f"no live job: {found.get('state', 'never ran')}, {age}"
    # A stamp of the future was written before the clock was set back: how long ago, nobody knows.
    stale = not -AHEAD_S <= found["heartbeat_age_s"] <= max_age_s
    stale = stale or found.get("process") in _STANDING
    return f"the job hangs ({found.get('process') or 'no news'}), {age}" if stale else ""


def _beat(found: Mapping[str, Any]) -> str:
    age = found.get("heartbeat_age_s", 0.0)
    return f"heartbeat {age:.0f} s ago" if age >= -AHEAD_S else f"heartbeat {-age:.0f} s ahead of this clock"


def status_lines(found: Mapping[str, Any]) -> list[str]:
    """The heartbeat in words."""
    if not found.get("run_id"):
        return ["no run has written a status here yet"]
    lines = [_headline(found), *_pace(found), *_money(found)]
    if found.get("waiting"):
        lines.append(f"waiting   {found['waiting']}")
    if found.get("errors"):
        told = ", ".join(f"{code} {count:,}" for code, count in sorted(found["errors"].items()))
        lines.append(f"errors    {told}   (`harvester explain CODE`)")
    lines += _ledger(found)
    if found.get("repeated_ids"):
        lines.append(f"ids       {found['repeated_ids']:,} answers carry the id of an earlier one")
    lines += _canaries(found)
    lines += [f"complaint {one}" for one in found.get("complaints", [])[-COMPLAINTS_SAID:]]
    if found.get("holds") and not found.get("alive", True):
        lines.append(f"on hold   the next run sends nothing: {'; '.join(found['holds'].values())}")
    lines.append(_who(found))
    return lines


def _headline(found: Mapping[str, Any]) -> str:
    done, total = rows_done(found), found.get("rows_total", 0)
    share = f" ({done / total:.1%})" if total else ""
    return (
        f"{found.get('state', '?')}: {done:,} of {total:,} rows{share}; {found.get('answers_stored', 0):,} "
        f"answers, {found.get('from_cache', 0):,} from cache, {found.get('dead', 0):,} failed"
    )


def rows_done(found: Mapping[str, Any]) -> int:
    """Number of rows that have an ending."""
    return sum(found.get(name, 0) for name in ("from_cache", "duplicates", "answers_stored", "dead"))


def _pace(found: Mapping[str, Any]) -> list[str]:
    if found.get("state") not in [*RunState, "hung"]:
        return []
    rates, limits = found.get("rates", {}), found.get("limits", {})
    requests, tokens = rates.get("requests_per_minute", 0), rates.get("tokens_per_minute", 0)
    lines = [
        f"rate      {requests:,.0f} requests/min{_of(limits.get('requests_per_minute'), requests)}, "
        f"{tokens:,.0f} tokens/min{_of(limits.get('tokens_per_minute'), tokens)}, "
        f"{found.get('refused_share', 0):.1%} refused",
        f"in flight {found.get('in_flight', 0):,} of a window of {found.get('window', 0):,}",
    ]
    eta = found.get("eta_s")
    if eta:
        lines.append(
            f"left      about {found.get('tokens_left', {}).get('likely', 0):,.0f} tokens: "
            f"{span(eta['low'])} to {span(eta['high'])} of work"
        )
    return [*lines, *(f"{name:<9} {said}" for name, said in calendar(found))]


def calendar(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """When it will be done, its hours counted in, and when they end; in the zone of this machine."""
    lines = []
    if done := found.get("done_at"):
        low, high = (schedule.here(done[side]) if done[side] is not None else "" for side in ("low", "high"))
        lines.append(("done", f"{low} to {high or 'more than a year from now'}" if low else "in over a year"))
    closes, deadline = found.get("closes_at"), found.get("finish_by")
    ends = [f"close {schedule.here(closes)}"] if closes is not None and closes != deadline else []
    ends += [f"deadline {schedule.here(deadline)}"] if deadline is not None else []
    return [*lines, ("hours", ", ".join(ends))] if ends else lines


def _of(limit: float | None, rate: float) -> str:
    return f" of {limit:,.0f} ({rate / limit:.0%})" if limit else ""


def _money(found: Mapping[str, Any]) -> list[str]:
    said = f"cost      ${found.get('cost_microusd', 0) / 1e6:.4f} this run"
    if canaries := (found.get("canary") or {}).get("cost_microusd"):
        said += f" and ${canaries / 1e6:.4f} for canaries"
    projected = found.get("cost_projected_microusd")
    if projected and found.get("state") in list(RunState):
        said += f", ${projected['low'] / 1e6:.4f} to ${projected['high'] / 1e6:.4f} projected"
    ever = found.get("cost_microusd_ever", 0)
    if ever != found.get("cost_microusd", 0):
        said += f" (${ever / 1e6:.4f} of all runs)"
    ceiling = found.get("budget", {}).get("microusd")
    if ceiling is not None:
        said += f", budget ${ceiling / 1e6:.4f}"
    return [said]


def _ledger(found: Mapping[str, Any]) -> list[str]:
    if "billed" not in found:  # the job's own words, without the journal's
        return []
    return [
        f"ledger    {found['held']:,} answers stored, {found['billed']:,} billed for "
        f"${found['cost_microusd_ever'] / 1e6:.4f}, {found['possibly_billed']:,} possibly billed "
        f"(${found['possibly_billed_microusd'] / 1e6:.4f} reserved; `harvester verify` lists them)"
    ]


def _canaries(found: Mapping[str, Any]) -> list[str]:
    canary, lines = found.get("canary") or {}, []
    failed = canary.get("stopped") or canary.get("missed")
    if canary:
        said = canary.get("said") or ("no change so far" if failed else "the teacher answers as before")
        lines.append(
            f"canaries  {canary.get('rounds', 0):,} rounds, {canary.get('changes', 0):,} changes: {said}"
        )
    if failed:
        what = "stopped" if canary.get("stopped") else "the last round failed, the next one tries again"
        lines.append(f"canaries  {what}: {failed}")
    if found.get("canary_billed") or found.get("canary_possibly_billed"):
        lines.append(
            f"canaries  {found['canary_billed']:,} answers billed for "
            f"${found['canary_microusd_ever'] / 1e6:.4f} beside the rows, "
            f"{found['canary_possibly_billed']:,} possibly billed "
            f"(${found['canary_possibly_billed_microusd'] / 1e6:.4f} reserved; `harvester verify "
            f"{found.get('store', 'STORE')}/{paths.CANARY}` lists them)"
        )
    return lines


def _who(found: Mapping[str, Any]) -> str:
    who = f"pid {found.get('pid', '?')} on {found.get('host', '?')}"
    beat = _beat(found)
    if not found.get("alive"):
        return f"process   none (was {who}), {beat}"
    state = found.get("process")
    return f"process   {who}{f', {state}' if state else ''}, {beat}"


def span(seconds: float) -> str:
    """Seconds as text, in the largest fitting unit."""
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} seconds"

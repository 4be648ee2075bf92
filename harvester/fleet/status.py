"""Put the status of all ranks together: sums, the worst state, and a line for each rank. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harvester.errors import HarvesterError, RunState
from harvester.observe.counters import Kind, Snapshot, declared
from harvester.observe.status import rows_done

Status = Mapping[str, Any]


@dataclass(slots=True)
class RankView:
    """What is known of one rank.

    Attributes:
        state: "starting", that of its run, "lost", or how it ended.
        host: where it runs.
        rows_total: of its prompts, 0 before it has read them.
        losses: how often its process was lost.
        note: what stands in its way.
    """

    state: str = "starting"
    host: str = ""
    rows_total: int = 0
    store: str = ""
    losses: int = 0
    note: str = ""
    status: Status = field(default_factory=dict)

    def as_dict(self, number: int) -> dict[str, Any]:
        """Return the entry of `ranks` in the status."""
        status = self.status
        return {
            "rank": number + 1,
            "state": self.state,
            "host": self.host,
            "pid": status.get("pid"),
            "store": self.store,
            "rows_done": rows_done(status),
            "rows_total": max(self.rows_total, status.get("rows_total", 0)),
            "answers_per_minute": (status.get("rates") or {}).get("answers_per_minute", 0.0),
            "share": min((each["share"] for each in status.get("shared") or []), default=None),
            "losses": self.losses,
            "note": self.note or status.get("waiting", ""),
        }


def fleet_status(
    views: Sequence[RankView], state: str, budgets: Mapping[str, Any], facts: Status
) -> dict[str, Any]:
    """Return one status for all ranks, with the fields of a run's.

    Counters are those of the runs that the ranks have now: what a lost process had counted is from the store
    for its successor.

    Args:
        facts: what does not change: config, model, times.
        budgets: of the whole harvest (`Allocator.budgets`).
    """
    statuses = [view.status for view in views]
    merged: dict[str, Any] = {}
    for metric in declared(Snapshot).values():
        values = [status[metric.status] for status in statuses if metric.status in status]
        merged[metric.status] = _together(metric.kind, values)
    rates: Counter[str] = Counter()
    for status in statuses:
        rates.update(status.get("rates") or {})
    requests = sum((status.get("rates") or {}).get("requests_per_minute", 0.0) for status in statuses)
    refused = sum(
        status.get("refused_share", 0.0) * (status.get("rates") or {}).get("requests_per_minute", 0.0)
        for status in statuses
    )
    limits = [
        (view.status.get("limits") or {}).get("requests_per_minute")
        for view in views
        if view.state in list(RunState)
    ]
    known = [limit for limit in limits if limit is not None]
    ranks = [view.as_dict(number) for number, view in enumerate(views)]
    etas = [status["eta_s"] for status in statuses if status.get("eta_s")]
    return {
        "state": state,
        **facts,
        "rows_total": sum(rank["rows_total"] for rank in ranks),
        **merged,
        "rates": {name: round(rate, 1) for name, rate in rates.items()},
        "refused_share": round(refused / requests, 4) if requests else 0.0,
        "limits": {"requests_per_minute": sum(known) if known else None},
        "learned": next((status["learned"] for status in statuses if status.get("learned")), []),
        "budget": dict(budgets.get("run") or {}),
        "budgets": dict(budgets),
        "eta_s": max(etas, key=lambda eta: float(eta["high"]), default=None),
        "complaints": [
            f"rank {number}: {text}"
            for number, view in enumerate(views, 1)
            for text in [*([view.note] if view.note else []), *(view.status.get("complaints") or [])[-1:]]
        ],
        "ranks": ranks,
    }


def _together(kind: Kind, values: list[Any]) -> Any:
    if kind is Kind.TEXT:
        return "; ".join(dict.fromkeys(filter(None, values)))
    if kind is Kind.COUNTS:
        counts: Counter[str] = Counter()
        for value in values:
            counts.update(value)
        return dict(counts)
    if kind is Kind.HISTOGRAM:
        return [sum(cells) for cells in zip(*values, strict=False)]
    return sum(value for value in values if math.isfinite(value))


def rank_lines(status: Status) -> list[str]:
    """Say in a line for each rank how far it is."""
    lines = []
    for rank in status.get("ranks") or []:
        share = f", share {rank['share']:.0%}" if rank.get("share") is not None else ""
        lost = f", lost {rank['losses']}x" if rank.get("losses") else ""
        note = f"; {rank['note']}" if rank.get("note") else ""
        where = rank.get("host") or "no machine"
        lines.append(
            f"rank {rank.get('rank', '?'):<4} {rank.get('state', '?')} at {where}: "
            f"{rank.get('rows_done', 0):,} of {rank.get('rows_total', 0):,} rows, "
            f"{rank.get('answers_per_minute', 0.0):,.0f} answers/min{share}{lost}{note}"
        )
    return lines


def overall_state(views: Sequence[RankView], *, is_draining: bool) -> str:
    """Return the state of the fleet while it runs."""
    states = {view.state for view in views}
    if is_draining:
        return RunState.DRAINING
    if states <= {RunState.ON_HOLD}:
        return RunState.ON_HOLD
    return RunState.RUNNING


def exit_code_of(codes: Sequence[int], signal_number: int) -> int:
    """Return the exit code of a fleet, from those of its ranks: the gravest.

    Terms, storage, teacher and configuration come before a held store, a limit, and failed rows.

    Args:
        signal_number: of the signal that ended it, 0 for none.
    """
    order = (77, 5, 4, 2, 1, 75)
    grave = next((code for code in order if code in codes), None)
    if grave is not None:
        return grave
    if signal_number:
        return 128 + signal_number
    return next((code for code in (*sorted({c for c in codes if c > 128}), 10, 3) if code in codes), 0)


def error_facts(error: HarvesterError) -> dict[str, Any]:
    """Return an error as JSON values."""
    return {
        "code": error.code,
        "exit_code": error.exit_code,
        "message": error.message,
        "place": error.place,
        "remedy": error.remedy,
    }

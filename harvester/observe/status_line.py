"""Say the status of a run as text: rows of a display, and one line for a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harvester.observe.status import budget_texts, calendar, rate_text, replica_texts, rows_done, span
from harvester.system.safe_text import one_line

Status = Mapping[str, Any]


def rows(status: Status) -> list[tuple[str, str]]:
    """Return (label, text) for rate and limits, requests in flight, time left, counts, errors, notes."""
    lines = [("rate", f"{rate_text(status)} (429)")]
    waiting = f", waiting: {status['waiting']}" if status.get("waiting") else ""
    lines.append(
        ("flight", f"{status.get('in_flight', 0):,} of a window of {status.get('window', 0):,}{waiting}")
    )
    lines += [("learned", text) for text in status.get("learned") or []]
    lines += [("address", text) for text in replica_texts(status)]
    if (eta := status.get("eta_s")) and eta["high"] >= 1:
        lines.append(("left", f"{span(eta['low'])} to {span(eta['high'])}{_projected(status)}"))
    lines += calendar(status)
    counts = [
        f"{status.get('answers_stored', 0):,} answers",
        f"{status.get('from_cache', 0):,} already stored",
        *(f"{status[name]:,} {label}" for name, label in _COUNTS if status.get(name)),
    ]
    lines.append(("so far", ", ".join(counts)))
    if status.get("errors"):
        errors = sorted(status["errors"].items(), key=lambda item: -item[1])
        lines.append(("errors", ", ".join(f"{code} {count:,}" for code, count in errors)))
    lasting = {name: budget for name, budget in (status.get("budgets") or {}).items() if name != "run"}
    lines += [("budget", text) for text in budget_texts(lasting)]
    if (status.get("canary") or {}).get("changes"):
        lines.append(("teacher", f"changed: {status['canary'].get('said', '')}"))
    if status.get("complaints") and status["complaints"][-1] != (status.get("canary") or {}).get("said"):
        lines.append(("note", str(status["complaints"][-1])))
    return lines


# Labels of `rows` that `status_line` leaves out.
_LONG = frozenset({"note", "done", "hours", "learned", "address"})

# Fields of the status that are shown if they are not 0, and their labels.
_COUNTS = (
    ("duplicates", "shared"),
    ("dead", "failed"),
    ("retries", "retries"),
    ("possibly_billed", "possibly billed"),
)


def status_line(status: Status, total: int) -> str:
    """Return the status as one line, for a log."""
    done = rows_done(status)
    parts = [f"{done:,}/{max(total, status.get('rows_total', 0)):,} rows, {money(status)}"]
    parts += [
        f"{text} left" if label == "left" else text for label, text in rows(status) if label not in _LONG
    ]
    return one_line("; ".join(parts))


def money(status: Status) -> str:
    """Return the cost so far, canaries included, and the budget if there is one."""
    canaries = (status.get("canary") or {}).get("cost_microusd", 0)
    cost = f"${(status.get('cost_microusd', 0) + canaries) / 1e6:.4f}"
    limit_microusd = (status.get("budget") or {}).get("microusd")
    return f"{cost} of ${limit_microusd / 1e6:,.2f}" if limit_microusd else cost


def _projected(status: Status) -> str:
    cost = status.get("cost_projected_microusd")
    return f", ${cost['low'] / 1e6:.4f} to ${cost['high'] / 1e6:.4f} in all" if cost and cost["high"] else ""

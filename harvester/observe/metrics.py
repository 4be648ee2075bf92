"""Derive every table of published values from the declarations in counters.py.

The progress records, the columns of trace.jsonl, Prometheus, OpenTelemetry and the table in data/FORMAT.md
all read `METRICS`. What status.json holds beside the counters (times, process, canaries) is declared here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harvester.observe.counters import Counters, Kind, Metric, Shown, Snapshot, declared

_GAUGES = (
    Metric(
        "When the job last wrote its status.",
        "s",
        Kind.GAUGE,
        status="updated_at",
        prometheus="heartbeat_timestamp_seconds",
    ),
    Metric(
        "When the run began.",
        "s",
        Kind.GAUGE,
        status="started_at",
        prometheus="run_start_timestamp_seconds",
    ),
    Metric(
        "Rows of this run: prompts x samples.",
        "{row}",
        Kind.GAUGE,
        status="rows_total",
        shown=Shown.PROGRESS,
        prometheus="rows",
    ),
    Metric(
        "Resident memory of the job's process.",
        "By",
        Kind.GAUGE,
        status="rss_bytes",
        shown=Shown.PROGRESS,
        prometheus="resident_memory_bytes",
        otel="process.memory.usage",
    ),
    Metric(
        "Open file descriptors of the job's process.",
        "{file_descriptor}",
        Kind.GAUGE,
        status="open_files",
        prometheus="open_fds",
        otel="process.unix.file_descriptor.count",
    ),
    Metric(
        "Tasks on the job's event loop.",
        "{task}",
        Kind.GAUGE,
        status="tasks",
        prometheus="tasks",
    ),
    Metric(
        "Longest delay of the event loop since the last point of trace.jsonl.",
        "s",
        Kind.GAUGE,
        status="loop_lag_s",
        shown=Shown.PROGRESS,
        prometheus="loop_lag_seconds",
        otel="harvester.loop.lag",
    ),
    Metric(
        "Rounds of canaries asked of this teacher.",
        "{round}",
        Kind.GAUGE,
        status="canary.rounds",
        prometheus="canary_rounds",
    ),
    Metric(
        "Rounds in which the teacher had changed.",
        "{round}",
        Kind.GAUGE,
        status="canary.changes",
        prometheus="canary_changes",
    ),
    Metric(
        "Mean distance of the last round's answers from the reference.",
        "1",
        Kind.GAUGE,
        status="canary.distance",
        prometheus="canary_distance_ratio",
    ),
    Metric(
        "When the last round was asked.",
        "s",
        Kind.GAUGE,
        status="canary.asked_at",
        prometheus="canary_round_timestamp_seconds",
    ),
    Metric(
        "Cost of canaries at the configured price.",
        "uUSD",
        status="canary.cost_microusd",
        otel="harvester.canary.cost",
    ),
)


def metrics_of(counters: type[Counters]) -> tuple[Metric, ...]:
    """Return all published values: those of a class of counters, then those that the status adds."""
    return (*declared(counters).values(), *_GAUGES)


METRICS = metrics_of(Snapshot)

# Fields of the status that a progress record holds beside the metrics that are shown there.
_ALSO_IN_PROGRESS = (
    "run_id",
    "state",
    "rates",
    "refused_share",
    "limits",
    "budget",
    "budgets",
    "eta_s",
    "canary",
    "complaints",
)
PROGRESS_FIELDS = (
    *_ALSO_IN_PROGRESS,
    *(metric.status for metric in METRICS if Shown.PROGRESS in metric.shown),
)

# What a point of the timeline holds where the status lacks the value.
_MISSING: Mapping[Kind, Any] = {Kind.TEXT: "", Kind.COUNTS: {}}


def trace_columns(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a line of trace.jsonl that come from metrics."""
    return {
        metric.trace: status.get(metric.status, _MISSING.get(metric.kind, 0))
        for metric in METRICS
        if metric.trace
    }


def value_in(status: Mapping[str, Any], path: str) -> Any:
    """Return the value at a metric's `status` path; None where there is none."""
    value: Any = status
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def format_table(metrics: Iterable[Metric]) -> str:
    """Return the table of counters in data/FORMAT.md, one line for each metric.

    tests/harvester/observe/test_counters.py compares the file with it.
    """
    columns = (
        "status.json",
        "meaning",
        "unit",
        "trace.jsonl",
        "`run --json`",
        "progress",
        "Prometheus",
        "OpenTelemetry",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for metric in metrics:
        labels = ",".join(f'{name}="{value}"' for name, value in metric.labels)
        cells = (
            _code(metric.status),
            metric.help,
            _code(metric.unit),
            _code(metric.trace),
            "yes" if Shown.SUMMARY in metric.shown else "",
            "yes" if Shown.PROGRESS in metric.shown else "",
            _code(
                f"harvester_{metric.prometheus}" + (f"{{{labels}}}" if labels else "")
                if metric.prometheus
                else ""
            ),
            _code(metric.otel),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""

"""Write the metrics of a store as Prometheus text: for `view` at /metrics, and for a textfile collector.

Most counters come from the journal and cover all runs of the store. The metrics that metrics.py declares come
from status.json and cover the last run. The text holds no prompt, no answer, no key and no path.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvester.errors import HarvesterError
from harvester.observe.counters import Kind, Metric
from harvester.observe.metrics import METRICS, value_in
from harvester.observe.report import report
from harvester.store.journal.records import Totals
from harvester.system import output_path
from harvester.system.command_line.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TEXTFILE_EVERY_S = 15.0
PREFIX = "harvester_"
Labels = Mapping[str, str]
Series = tuple[str, Labels, float]  # suffix of the name, labels, value


# What the text of any store begins with.
_BEGINNING = b"# HELP harvester_"


def metrics_text(store: Path) -> str:
    """Return all metrics of a store as text.

    Raises:
        StoreError: it can't be read.
    """
    status, totals, _ = report.ledger_of(store)
    return "".join([*_of_store(totals), *_canaries_of_store(status), *_state(status), *run_metrics(status)])


def write_textfile(store: Path, out: Path) -> None:
    """Write the metrics to a file that a collector may read at any instant: whole, or the one before.

    Raises:
        StoreError: the store can't be read. ConfigError: the file can't be written.
    """
    text = metrics_text(store)
    with output_path.replacing(out, store, _BEGINNING) as file:
        file.write(text.encode())
        os.fchmod(file.fileno(), 0o644)  # whatever the umask is


@contextmanager
def updating_textfile(
    store: Path, out: Path, say: Callable[[str], None], every_s: float = TEXTFILE_EVERY_S
) -> Iterator[None]:
    """Write the textfile every 15 s and once at the end, from a thread; what it meets then ends no run.

    Args:
        say: called with the error the first time in a row that writing fails.

    Raises:
        ConfigError: nothing can be written there, as far as can be seen before the block begins.
    """
    output_path.check(out, store, _BEGINNING)
    over = threading.Event()
    complained = False

    def write() -> None:
        nonlocal complained
        try:
            write_textfile(store, out)
            complained = False
        except HarvesterError as error:
            if not complained:
                say(f"--metrics-file: {error}; the run goes on")
            complained = True

    def work() -> None:
        while not over.wait(every_s):
            write()

    thread = threading.Thread(target=work, name="textfile", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        write()


def family(name: str, kind: str, about: str, samples: Sequence[Series]) -> str:
    """Return one metric: HELP, TYPE and a line for each (suffix, labels, value); "" when there are none."""
    if not samples:
        return ""
    lines = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
    for suffix, labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"{name}{suffix}{f'{{{inside}}}' if inside else ''} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _single(value: float) -> list[Series]:
    return [("", {}, value)]


def _by(label: str, counts: Mapping[str, float]) -> list[Series]:
    return [("", {label: name}, count) for name, count in sorted(counts.items())]


def _of_store(totals: Totals) -> Iterator[str]:
    """The counters over all runs of the store, from its journal."""
    tokens = {"input": totals.input_tokens, "output": totals.output_tokens}
    for name, about, samples in (
        ("attempts", "Attempts put on the wire.", _single(totals.attempts)),
        ("answers", "Answers stored, by outcome.", _by("outcome", totals.outcomes)),
        ("attempt_errors", "Attempts that brought no answer, by error code.", _by("code", totals.errors)),
        ("tokens", "Tokens billed, by type.", _by("type", tokens)),
        ("cost_dollars", "Cost of rows at the configured price.", _single(totals.cost_microusd / 1e6)),
        ("paid_twice", "Answers that were paid more than once.", _single(totals.paid_twice)),
    ):
        yield family(f"harvester_{name}_total", "counter", about, samples)
    yield family(
        "harvester_failed_rows",
        "gauge",
        "Rows that have no answer and are not asked again as things stand.",
        _single(totals.dead),
    )
    yield family(
        "harvester_possibly_billed_attempts",
        "gauge",
        "Attempts that may have been billed without an answer we hold.",
        _single(totals.possibly_billed),
    )


def _canaries_of_store(status: Mapping[str, Any]) -> Iterator[str]:
    """What the canaries cost over all runs: the budget pays them too, but they are no rows."""
    for name, kind, key, scale, about in (
        ("answers_total", "counter", "billed", 1.0, "Canaries' answers that were billed."),
        ("cost_dollars_total", "counter", "microusd_ever", 1e6, "Cost of canaries at the configured price."),
        (
            "possibly_billed_attempts",
            "gauge",
            "possibly_billed",
            1.0,
            "Canaries' attempts that may have been billed without an answer we hold.",
        ),
    ):
        value = status.get(f"canary_{key}")
        if isinstance(value, int | float):
            yield family(f"harvester_canary_{name}", kind, about, _single(value / scale))


def run_metrics(status: Mapping[str, Any]) -> Iterator[str]:
    """Return the metrics of the last run that harvester/observe/metrics.py declares, in its order."""
    families: dict[str, tuple[Metric, list[Series]]] = {}
    for metric in METRICS:
        if metric.prometheus:
            _, series = families.setdefault(metric.prometheus, (metric, []))
            series += _series(metric, status)
    for name, (metric, series) in families.items():
        yield family(f"{PREFIX}{name}", _type(metric), metric.family or metric.help, series)


def _type(metric: Metric) -> str:
    if metric.kind is Kind.HISTOGRAM:
        return "histogram"
    return "counter" if metric.prometheus.endswith("_total") else "gauge"


def _series(metric: Metric, status: Mapping[str, Any]) -> list[Series]:
    """The lines of one metric; none where the status lacks it."""
    value, labels = value_in(status, metric.status), dict(metric.labels)
    if metric.kind is Kind.HISTOGRAM:
        return _cells(metric.edges, value, status.get(metric.total, 0), labels)
    if metric.kind is Kind.COUNTS:
        return [("", {**labels, "name": name}, count) for name, count in sorted((value or {}).items())]
    return [("", labels, value)] if isinstance(value, int | float) else []


def _state(status: Mapping[str, Any]) -> Iterator[str]:
    """What is no single number of the status: version, state, limits in force, time left, budget."""
    version: Labels = {"version": __version__}
    yield family(f"{PREFIX}build_info", "gauge", "Version of the harvester.", [("", version, 1)])
    if not status:
        return
    state = str(status.get("state", ""))
    yield family(f"{PREFIX}state", "gauge", "1 for the state of the job.", [("", {"state": state}, 1)])
    limits = status.get("limits") or {}
    for unit in ("requests", "tokens"):
        rate = limits.get(f"{unit}_per_minute")
        if rate is not None:
            name, help = f"{PREFIX}{unit}_limit_per_second", f"The limit on {unit} in force."
            yield family(name, "gauge", help, _single(rate / 60))
    yield from _replicas(status)
    left = _by("bound", status.get("eta_s") or {})
    yield family(f"{PREFIX}time_left_seconds", "gauge", "Estimated time left, as a range.", left)
    budget = status.get("budget") or {}
    for name, key, scale in (("dollars", "microusd", 1e-6), ("tokens", "tokens", 1.0)):
        if budget.get(key) is not None:
            ceiling, spent = budget[key] * scale, (budget.get(f"{key}_spent") or 0) * scale
            yield family(f"{PREFIX}budget_{name}", "gauge", "The ceiling of this run.", _single(ceiling))
            yield family(f"{PREFIX}budget_spent_{name}", "gauge", "Spent of it.", _single(spent))
    for name, key, scale in (("dollars", "microusd", 1e-6), ("tokens", "tokens", 1.0)):
        left_by_span: list[Series] = [
            ("", {"span": span}, budget[f"{key}_left"] * scale)
            for span, budget in (status.get("budgets") or {}).items()
            if budget.get(f"{key}_left") is not None
        ]
        if left_by_span:
            yield family(f"{PREFIX}budget_left_{name}", "gauge", "Left of each ceiling.", left_by_span)


def _replicas(status: Mapping[str, Any]) -> Iterator[str]:
    """State and pace of each address, where there are several."""
    replicas = status.get("replicas") or []
    states: list[Series] = [
        ("", {"endpoint": str(one.get("endpoint")), "state": str(one.get("state"))}, 1) for one in replicas
    ]
    yield family(f"{PREFIX}replica_state", "gauge", "1 for the state of an address.", states)
    for name, key, scale, about in (
        ("window_requests", "window", 1.0, "Requests allowed on the wire at once, by address."),
        ("in_flight_requests", "in_flight", 1.0, "Requests on the wire, by address."),
        ("answers_total", "answers", 1.0, "Answers of this run, by address."),
        ("answers_per_second", "answers_per_minute", 60.0, "Answers over the last minute, by address."),
        ("latency_seconds", "latency_s", 1.0, "Average latency of the last answers, by address."),
        ("unusable_ratio", "unusable_share", 1.0, "Unusable share of the last answers, by address."),
        ("taken_back_total", "taken_back", 1.0, "Answers taken out of the store again, by address."),
    ):
        series: list[Series] = [
            ("", {"endpoint": str(one.get("endpoint"))}, one[key] / scale)
            for one in replicas
            if isinstance(one.get(key), int | float)
        ]
        kind = "counter" if name.endswith("_total") else "gauge"
        yield family(f"{PREFIX}replica_{name}", kind, about, series)


def _cells(
    edges: Sequence[float], counts: Sequence[int] | None, total: float, labels: Labels
) -> list[Series]:
    """Cumulative cells; none where there are no counts, or where another release used other edges."""
    if counts is None or len(counts) != len(edges) + 1:
        return []
    below, rows = 0, []
    for edge, count in zip([*map(_number, edges), "+Inf"], counts, strict=True):
        below += count
        rows.append(("_bucket", {**labels, "le": edge}, float(below)))
    return [*rows, ("_sum", labels, float(total)), ("_count", labels, float(below))]

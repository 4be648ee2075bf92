"""Prometheus text about a store: for the view's /metrics, and for node_exporter's textfile collector.

Counters are the ledger's, over all runs of the store; histograms and gauges are the last run's. There is no
prompt, no answer, no key and no path in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvester import __version__
from harvester.errors import HarvesterError
from harvester.observe.counters import LATENCY_EDGES_S, TOKEN_EDGES
from harvester.observe.report import report
from harvester.store.journal.records import Totals
from harvester.system import output_path

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TEXTFILE_EVERY_S = 15.0
Labels = Mapping[str, str]


def exposed(store: Path) -> str:
    """All metrics of a store as text.

    Raises:
        StoreError: it can't be read.
    """
    status, totals, _ = report.ledger_of(store)
    return "".join([*_counters(totals), *_canary_ledger(status), *_gauges(status), *_histograms(status)])


def write_textfile(store: Path, out: Path) -> None:
    """Write the metrics to a file that a collector may read at any instant: whole, or the one before.

    Raises:
        StoreError: the store can't be read. ConfigError: the file can't be written.
    """
    text = exposed(store)
    with output_path.replacing(out, store) as hidden:
        hidden.write_text(text, encoding="utf-8")
        hidden.chmod(0o644)


@contextmanager
def kept(
    store: Path, out: Path, say: Callable[[str], None], every_s: float = TEXTFILE_EVERY_S
) -> Iterator[None]:
    """Write the textfile every 15 s and once at the end, from a thread; what it meets then ends no run.

    Args:
        say: told of the first time in a row that it could not be written.

    Raises:
        ConfigError: nothing can be written there, as far as can be seen before the block begins.
    """
    output_path.check(out, store)
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


def family(name: str, kind: str, about: str, samples: Sequence[tuple[str, Labels, float]]) -> str:
    """One metric: HELP, TYPE and a line for each (suffix, labels, value); "" when there are none."""
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


def _one(value: float) -> list[tuple[str, Labels, float]]:
    return [("", {}, value)]


def _by(label: str, counts: Mapping[str, float]) -> list[tuple[str, Labels, float]]:
    return [("", {label: name}, count) for name, count in sorted(counts.items())]


def _counters(totals: Totals) -> Iterator[str]:
    tokens = {"input": totals.input_tokens, "output": totals.output_tokens}
    for name, about, samples in (
        ("attempts", "Attempts put on the wire.", _one(totals.attempts)),
        ("answers", "Answers stored, by outcome.", _by("outcome", totals.outcomes)),
        ("attempt_errors", "Attempts that brought no answer, by error code.", _by("code", totals.errors)),
        ("tokens", "Tokens billed, by type.", _by("type", tokens)),
        ("cost_dollars", "Cost of rows at the configured price.", _one(totals.cost_microusd / 1e6)),
        ("paid_twice", "Answers that were paid more than once.", _one(totals.paid_twice)),
    ):
        yield family(f"harvester_{name}_total", "counter", about, samples)
    yield family(
        "harvester_failed_rows",
        "gauge",
        "Rows that have no answer and are not asked again as things stand.",
        _one(totals.dead),
    )
    yield family(
        "harvester_possibly_billed_attempts",
        "gauge",
        "Attempts that may have been billed without an answer we hold.",
        _one(totals.possibly_billed),
    )


def _canary_ledger(status: Mapping[str, Any]) -> Iterator[str]:
    """The canaries' own ledger: what the budget pays beside the rows."""
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
            yield family(f"harvester_canary_{name}", kind, about, _one(value / scale))


def _gauges(status: Mapping[str, Any]) -> Iterator[str]:
    yield family(
        "harvester_build_info", "gauge", "Version of the harvester.", [("", {"version": __version__}, 1)]
    )
    if not status:
        return
    state = str(status.get("state", ""))
    yield family("harvester_state", "gauge", "1 for the state of the job.", [("", {"state": state}, 1)])
    for name, key, about in _PLAIN_GAUGES:
        value = status.get(key)
        if isinstance(value, int | float):
            yield family(f"harvester_{name}", "gauge", about, _one(value))
    for name, key, about in _CANARY_GAUGES:
        value = (status.get("canary") or {}).get(key)
        if isinstance(value, int | float):
            yield family(f"harvester_canary_{name}", "gauge", about, _one(value))
    rows = {name: status.get(key, 0) for name, key in _ROWS.items()}
    yield family(
        "harvester_rows_done", "gauge", "Rows of this run with an ending, by ending.", _by("ending", rows)
    )
    limits = status.get("limits") or {}
    for unit in ("requests", "tokens"):
        rate = limits.get(f"{unit}_per_minute")
        if rate is not None:
            yield family(
                f"harvester_{unit}_limit_per_second",
                "gauge",
                f"The limit on {unit} in force.",
                _one(rate / 60),
            )
    left = status.get("eta_s") or {}
    yield family(
        "harvester_time_left_seconds", "gauge", "Estimated time left, as a range.", _by("bound", left)
    )
    budget = status.get("budget") or {}
    for name, key, scale in (("dollars", "microusd", 1e-6), ("tokens", "tokens", 1.0)):
        if budget.get(key) is not None:
            yield family(
                f"harvester_budget_{name}", "gauge", "The ceiling of this run.", _one(budget[key] * scale)
            )
            spent = budget.get(f"{key}_spent", 0) * scale
            yield family(f"harvester_budget_spent_{name}", "gauge", "Spent of it.", _one(spent))


_ROWS = {"cached": "from_cache", "duplicate": "duplicates", "answered": "answers_stored", "failed": "dead"}
_PLAIN_GAUGES = (
    ("heartbeat_timestamp_seconds", "updated_at", "When the job last wrote its status."),
    ("run_start_timestamp_seconds", "started_at", "When the run began."),
    ("rows", "rows_total", "Rows of this run: prompts x samples."),
    ("in_flight_requests", "in_flight", "Requests on the wire."),
    ("window_requests", "window", "Requests allowed on the wire at once."),
    ("resident_memory_bytes", "rss_bytes", "Resident memory of the job's process."),
    ("open_fds", "open_files", "Open file descriptors of the job's process."),
    ("tasks", "tasks", "Tasks on the job's event loop."),
    ("loop_lag_seconds", "loop_lag_s", "Latest that the event loop came back of late."),
)
_CANARY_GAUGES = (
    ("rounds", "rounds", "Rounds of canaries asked of this teacher."),
    ("changes", "changes", "Rounds in which the teacher had changed."),
    ("distance_ratio", "distance", "Mean distance of the last round's answers from the reference."),
    ("round_timestamp_seconds", "asked_at", "When the last round was asked."),
)


def _histograms(status: Mapping[str, Any]) -> Iterator[str]:
    seconds = _cells(LATENCY_EDGES_S, status.get("latency_counts"), status.get("latency_sum_s", 0.0), {})
    about = "Send to last byte of the attempts that answered."
    yield family("harvester_request_duration_seconds", "histogram", about, seconds)
    tokens: list[tuple[str, Labels, float]] = []
    for kind in ("input", "output"):
        counts, total = status.get(f"{kind}_token_counts"), status.get(f"{kind}_tokens", 0)
        tokens += _cells(TOKEN_EDGES, counts, total, {"type": kind})
    yield family("harvester_usage_tokens", "histogram", "Tokens of an answer, by type.", tokens)


def _cells(
    edges: Sequence[float], counts: Sequence[int] | None, total: float, labels: Labels
) -> list[tuple[str, Labels, float]]:
    """Cumulative cells; none where there are no counts, or another release counted by other edges."""
    if counts is None or len(counts) != len(edges) + 1:
        return []
    below, rows = 0, []
    for edge, count in zip([*map(_number, edges), "+Inf"], counts, strict=True):
        below += count
        rows.append(("_bucket", {**labels, "le": edge}, float(below)))
    return [*rows, ("_sum", labels, float(total)), ("_count", labels, float(below))]

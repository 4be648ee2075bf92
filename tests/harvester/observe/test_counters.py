"""Counters are declared once: a new line in counters.py appears in every published format."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from harvester.observe.counters import Counters, Snapshot, declared, snapshot
from harvester.observe.metrics import METRICS, PROGRESS_FIELDS, format_table, trace_columns

ROOT = Path(__file__).resolve().parents[3]
BEGIN, END = "<!-- counters: begin -->\n", "<!-- counters: end -->\n"
# One line, as a contributor would add it above `rows`.
NEW_LINE = (
    '    hedged: Annotated[int, Metric("Attempts sent twice.", "{attempt}", trace="hedged", '
    'shown=RUN_AND_CANARY, prometheus="hedged_total", otel="harvester.hedged")] = 0\n'
)
# Publishes one counted attempt in every format. Runs in a process of its own, on a copy of the package.
PUBLISH = """
import json, pathlib, sys
from harvester.errors import Ending
from harvester.observe import counters, metrics, otel, status, timeline
from harvester.observe.report import prometheus
from harvester.run.endings import Summary

store = pathlib.Path(sys.argv[1])
counts = counters.Counters()
counts.hedged += 3
shot = counters.snapshot(counts)
status.write_status(store, {"run_id": "r", "canary": counts.of_canaries(), **shot.as_dict()})
read = status.read_status(store)
timeline.TimelineWriter(store, "r").note(read, {})
summary = Summary(
    run_id="r", ending=Ending.COMPLETE, exit_code=0, rows_total=1, counts=shot,
    sealed_rows=0, store="s", resume="",
)
odd = {"hedged": float("nan"), "canary": {"hedged": "x"}}
status.write_status(store, odd)
points = [
    (metric.name, point.value)
    for resource in otel.export_of(read, {}, 1).resource_metrics
    for scope in resource.scope_metrics
    for metric in scope.metrics
    if metric.name == "harvester.hedged"
    for point in metric.data.data_points
] if sys.argv[2] == "otel" else [("harvester.hedged", 3)]
print(json.dumps({
    "status": (read["hedged"], read["canary"]["hedged"]),
    "refused": status.read_status(store),
    "trace": timeline.read_timeline(store)[0]["hedged"],
    "summary": summary.as_dict()["hedged"],
    "progress": "hedged" in metrics.PROGRESS_FIELDS,
    "prometheus": [line for line in "".join(prometheus.run_metrics(read)).splitlines() if "hedged" in line],
    "otel": points,
    "table": [line for line in metrics.format_table(metrics.METRICS).splitlines() if "hedged" in line],
}))
"""


def test_a_new_counter_is_one_line(tmp_path: Path):
    shutil.copytree(ROOT / "harvester", tmp_path / "harvester", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "harvester/observe/counters.py"
    text = path.read_text(encoding="utf-8")
    first = "    rows: Annotated["
    assert text.count(first) == 1
    path.write_text(text.replace(first, NEW_LINE + first), encoding="utf-8")
    try:
        import opentelemetry.sdk.metrics  # noqa: F401

        has_otel = "otel"
    except ImportError:
        has_otel = "none"
    store = tmp_path / "store"
    store.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, str(store), has_otel],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    published = json.loads(done.stdout)
    assert published["status"] == [3, 3]
    assert published["refused"] == {"canary": {}}
    assert published["trace"] == published["summary"] == 3
    assert published["progress"]
    assert published["prometheus"] == [
        "# HELP harvester_hedged_total Attempts sent twice.",
        "# TYPE harvester_hedged_total counter",
        "harvester_hedged_total 3",
    ]
    assert published["otel"] == [["harvester.hedged", 3]]
    (row,) = published["table"]
    assert "`harvester_hedged_total`" in row
    assert "`harvester.hedged`" in row


def test_the_format_document_holds_the_table_of_the_declarations():
    text = (ROOT / "data/FORMAT.md").read_text(encoding="utf-8")
    table = text.split(BEGIN)[1].split(END)[0]
    assert table == format_table(METRICS), "paste format_table(METRICS) between the two marks"


def test_a_snapshot_is_a_copy():
    counters = Counters()
    counters.note(counters.errors, "timeout")
    taken = snapshot(counters, in_flight=2, window=3, waiting="window of 3 in flight")
    counters.note(counters.errors, "timeout")
    counters.note_request(0.5)
    counters.note_answer(10, 20)
    assert (taken.errors, sum(taken.latency_counts), taken.input_tokens) == ({"timeout": 1}, 0, 0)
    assert (taken.in_flight, taken.window, taken.waiting) == (2, 3, "window of 3 in flight")


def test_every_field_is_declared_with_its_meaning():
    assert list(declared(Snapshot)) == [field.name for field in fields(Snapshot)]
    assert all(metric.help.endswith(".") or ";" in metric.help for metric in METRICS)
    paths = [metric.status for metric in METRICS]
    assert len(set(paths)) == len(paths)


def test_names_of_a_published_format_stay():
    """These names are read by others; changing one needs a line in the changelog."""
    assert set(trace_columns({})) == {
        *("sent", "stored", "cached", "dead", "limited", "retries", "errors", "waiting"),
        *("input_tokens", "output_tokens", "microusd", "in_flight", "window"),
    }
    assert set(Counters().summary()) == {
        *("requests_sent", "answers_stored", "from_cache", "duplicates", "dead"),
        *("possibly_billed", "cost_microusd", "usage_corrected", "outcomes", "cached_outcomes"),
        *("accepted", "rejected", "unverifiable", "answers_early"),
        *("requests_joined", "answers_joined", "choices_missing", "choices_surplus", "taken_back"),
    }
    assert set(Counters().of_canaries()) == {
        *("requests_sent", "answers_stored", "possibly_billed", "cost_microusd"),
    }
    assert "voices" in Counters().as_dict()
    assert {"run_id", "state", "waiting", "rows_total", "retries", "rss_bytes"} <= set(PROGRESS_FIELDS)
    assert len(PROGRESS_FIELDS) == len(set(PROGRESS_FIELDS)) == 33


@pytest.mark.parametrize("distinct", [3, 40])
def test_few_models_are_counted_by_name(distinct: int):
    counters = Counters()
    assert not counters.note_model("m0")
    assert all(counters.note_model(f"m{number}") for number in range(1, distinct))
    assert sum(counters.served_models.values()) == distinct
    assert len(counters.served_models) == min(distinct, 21)

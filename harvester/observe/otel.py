"""The status in OpenTelemetry's words, sent by OTLP when the operator asks for it; an optional extra.

Nothing is sent unless `run --otel` says so; then to OTEL_EXPORTER_OTLP_ENDPOINT, with counts and durations
only: no prompt, no answer, no key. The SDK's instruments are not used: our own cells are what its GenAI
conventions advise, so a snapshot becomes its data points as it is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from harvester import __version__
from harvester.errors import ConfigError
from harvester.observe.counters import LATENCY_EDGES_S, TOKEN_EDGES

EVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class Name:
    """A row of the table: our field(s) of the status, and what OpenTelemetry calls it.

    `kind` is histogram (field holds counts, `total` their sum), counter, gauge, or counters (field holds
    counts by name, which goes into the attribute `by`).
    """

    field: str
    name: str
    unit: str
    kind: str
    about: str
    total: str = ""
    edges: Sequence[float] = ()
    by: str = ""
    attributes: tuple[tuple[str, str], ...] = ()


NAMES = (
    Name(
        "latency_counts",
        "gen_ai.client.operation.duration",
        "s",
        "histogram",
        "GenAI operation duration.",
        "latency_sum_s",
        LATENCY_EDGES_S,
    ),
    Name(
        "input_token_counts",
        "gen_ai.client.token.usage",
        "{token}",
        "histogram",
        "Tokens used, by type.",
        "input_tokens",
        TOKEN_EDGES,
        attributes=(("gen_ai.token.type", "input"),),
    ),
    Name(
        "output_token_counts",
        "gen_ai.client.token.usage",
        "{token}",
        "histogram",
        "Tokens used, by type.",
        "output_tokens",
        TOKEN_EDGES,
        attributes=(("gen_ai.token.type", "output"),),
    ),
    Name(
        "errors",
        "harvester.attempt.errors",
        "{attempt}",
        "counters",
        "Attempts without an answer.",
        by="error.type",
    ),
    Name("requests_sent", "harvester.attempts", "{attempt}", "counter", "Attempts put on the wire."),
    Name("answers_stored", "harvester.answers", "{answer}", "counter", "Answers that are durable."),
    Name("dead", "harvester.failed_rows", "{row}", "counter", "Rows that will get no answer."),
    Name("cost_microusd", "harvester.cost", "uUSD", "counter", "Cost of rows at the configured price."),
    Name("canary.cost_microusd", "harvester.observe.canary.cost", "uUSD", "counter", "Cost of canaries."),
    Name("in_flight", "harvester.requests.in_flight", "{request}", "gauge", "Requests on the wire."),
    Name("window", "harvester.requests.window", "{request}", "gauge", "Requests allowed on the wire."),
    Name("rss_bytes", "process.memory.usage", "By", "gauge", "Resident memory."),
    Name("open_files", "process.unix.file_descriptor.count", "{file_descriptor}", "gauge", "Open files."),
    Name("loop_lag_s", "harvester.loop.lag", "s", "gauge", "Latest that the event loop came back of late."),
)
"""OpenTelemetry GenAI semantic conventions where they have a name for it; ours begin with `harvester`."""


def attributes_of(base_url: str, model: str) -> dict[str, str | int]:
    """The attributes of every GenAI point: who was asked for what."""
    url = urlsplit(base_url)
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": url.hostname or "unknown",
        "gen_ai.request.model": model,
        "server.address": url.hostname or "",
        "server.port": url.port or (443 if url.scheme == "https" else 80),
    }


def metrics_of(told: Mapping[str, Any], common: Mapping[str, str | int], now_ns: int) -> Any:
    """A status snapshot as the SDK's MetricsData, cumulative since the run began."""
    from opentelemetry.sdk.metrics import export as sdk
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    began_ns = int(float(told.get("started_at") or 0) * 1e9)
    points: dict[Name, list[Any]] = {}
    first: dict[str, Name] = {}
    for row in NAMES:
        value = _value(told, row.field)
        if value is None or (row.kind == "histogram" and len(value) != len(row.edges) + 1):
            continue
        kept = first.setdefault(row.name, row)
        labels = {**(common if row.name.startswith("gen_ai") else {}), **dict(row.attributes)}
        points.setdefault(kept, []).extend(_points(row, value, told, labels, (began_ns, now_ns)))
    cumulative = sdk.AggregationTemporality.CUMULATIVE
    metrics = []
    for row, found in points.items():
        data: Any = sdk.Gauge(found)
        if row.kind == "histogram":
            data = sdk.Histogram(found, cumulative)
        elif row.kind != "gauge":
            data = sdk.Sum(found, cumulative, is_monotonic=True)
        metrics.append(sdk.Metric(row.name, row.about, row.unit, data))
    resource = Resource(
        {
            "service.name": "harvester",
            "service.version": __version__,
            "service.instance.id": str(told.get("run_id", "")),
        }
    )
    scope = sdk.ScopeMetrics(InstrumentationScope("harvester", __version__), metrics, "")
    return sdk.MetricsData([sdk.ResourceMetrics(resource, [scope], "")])


def _value(told: Mapping[str, Any], field: str) -> Any:
    """A field of the status, `outer.inner` for one inside another; None where there is none."""
    outer, _, inner = field.partition(".")
    value = told.get(outer)
    return (value or {}).get(inner) if inner else value


def _points(
    row: Name, value: Any, told: Mapping[str, Any], labels: Mapping[str, Any], span_ns: tuple[int, int]
) -> list[Any]:
    from opentelemetry.sdk.metrics import export as sdk

    if row.kind == "counters":
        return [sdk.NumberDataPoint({row.by: name}, *span_ns, count) for name, count in sorted(value.items())]
    if row.kind != "histogram":
        return [sdk.NumberDataPoint(labels, *span_ns, value)]
    held = [cell for cell, count in enumerate(value) if count]
    edges = [0.0, *row.edges, row.edges[-1]]
    # Least and most are known to the cell only.
    low, high = (edges[held[0]], edges[held[-1] + 1]) if held else (0.0, 0.0)
    total = told.get(row.total, 0)
    return [
        sdk.HistogramDataPoint(labels, *span_ns, sum(value), total, list(value), list(row.edges), low, high)
    ]


@contextmanager
def sent(
    base_url: str, model: str, say: Callable[[str], None], every_s: float = EVERY_S
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Send the newest snapshot every 30 s and once at the end, from a thread of its own.

    A collector that is away ends nothing: it is said once.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics.export import MetricExportResult
    except ImportError:
        raise ConfigError(
            "OpenTelemetry is not installed",
            place="--otel",
            remedy="pip install 'blackbox-distillation[otel]'",
        ) from None
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    logging.getLogger("opentelemetry").propagate = False
    exporter, common, over = OTLPMetricExporter(timeout=5), attributes_of(base_url, model), threading.Event()
    latest: dict[str, Any] = {}
    complained = False

    def send() -> None:
        nonlocal complained
        if not latest:
            return
        done = exporter.export(metrics_of(dict(latest), common, time.time_ns()))
        if done is not MetricExportResult.SUCCESS and not complained:
            complained = True
            say("telemetry was not delivered; is OTEL_EXPORTER_OTLP_ENDPOINT right? The run goes on")

    def work() -> None:
        while not over.wait(every_s):
            send()

    thread = threading.Thread(target=work, name="otel", daemon=True)
    thread.start()
    try:
        yield latest.update
    finally:
        over.set()
        thread.join()
        send()
        exporter.shutdown()

"""Send the counters of a run to an OpenTelemetry collector (OTLP over HTTP); needs the extra `otel`.

Nothing is sent unless the operator asks for it with `run --otel`. The address is OTEL_EXPORTER_OTLP_ENDPOINT.
Only counts and durations are sent: no prompt, no answer, no key. The SDK's instruments are not used, because
the histograms in counters.py already have the cells that the GenAI conventions advise.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from harvester.errors import ConfigError
from harvester.observe.counters import Kind, Metric
from harvester.observe.metrics import METRICS, value_in
from harvester.system.command_line.version import __version__

# Seconds between two exports.
EVERY_S = 30.0


def attributes_of(base_url: str, model: str) -> dict[str, str | int]:
    """Return the attributes of every GenAI point: operation, provider, model, server."""
    url = urlsplit(base_url)
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": url.hostname or "unknown",
        "gen_ai.request.model": model,
        "server.address": url.hostname or "",
        "server.port": url.port or (443 if url.scheme == "https" else 80),
    }


def export_of(status: Mapping[str, Any], common: Mapping[str, str | int], now_ns: int) -> Any:
    """Return a status as the SDK's MetricsData; counts are cumulative since the run began.

    Args:
        common: the attributes of every GenAI point, from `attributes_of`.
        now_ns: Unix time in nanoseconds.
    """
    from opentelemetry.sdk.metrics import export as sdk
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    began_ns = int(float(status.get("started_at") or 0) * 1e9)
    points: dict[str, list[Any]] = {}
    first: dict[str, Metric] = {}
    for metric in METRICS:
        value = value_in(status, metric.status) if metric.otel else None
        if value is None or (metric.kind is Kind.HISTOGRAM and len(value) != len(metric.edges) + 1):
            continue
        first.setdefault(metric.otel, metric)
        attributes = {**(common if metric.otel.startswith("gen_ai") else {}), **dict(metric.attributes)}
        points.setdefault(metric.otel, []).extend(
            _points(metric, value, status, attributes, (began_ns, now_ns))
        )
    cumulative = sdk.AggregationTemporality.CUMULATIVE
    metrics = []
    for name, metric in first.items():
        data: Any = sdk.Gauge(points[name])
        if metric.kind is Kind.HISTOGRAM:
            data = sdk.Histogram(points[name], cumulative)
        elif metric.kind is not Kind.GAUGE:
            data = sdk.Sum(points[name], cumulative, is_monotonic=True)
        metrics.append(sdk.Metric(name, metric.family or metric.help, metric.unit, data))
    resource = Resource(
        {
            "service.name": "harvester",
            "service.version": __version__,
            "service.instance.id": str(status.get("run_id", "")),
        }
    )
    scope = sdk.ScopeMetrics(InstrumentationScope("harvester", __version__), metrics, "")
    return sdk.MetricsData([sdk.ResourceMetrics(resource, [scope], "")])


def _points(
    metric: Metric,
    value: Any,
    status: Mapping[str, Any],
    attributes: Mapping[str, Any],
    span_ns: tuple[int, int],
) -> list[Any]:
    """The data points of one metric; `span_ns` is when the run began and now."""
    from opentelemetry.sdk.metrics import export as sdk

    if metric.kind is Kind.COUNTS:
        return [
            sdk.NumberDataPoint({metric.by: name}, *span_ns, count) for name, count in sorted(value.items())
        ]
    if metric.kind is not Kind.HISTOGRAM:
        return [sdk.NumberDataPoint(attributes, *span_ns, value)]
    filled = [cell for cell, count in enumerate(value) if count]
    edges = [0.0, *metric.edges, metric.edges[-1]]
    # The least and the greatest value are known only as the edges of their cells.
    low, high = (edges[filled[0]], edges[filled[-1] + 1]) if filled else (0.0, 0.0)
    total = status.get(metric.total, 0)
    return [
        sdk.HistogramDataPoint(
            attributes, *span_ns, sum(value), total, list(value), list(metric.edges), low, high
        )
    ]


@contextmanager
def exporting(
    base_url: str, model: str, say: Callable[[str], None], every_s: float = EVERY_S
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Send the newest status every `every_s` seconds and once at the end, from a thread; yields its `update`.

    A collector that can't be reached does not end the run; `say` gets one message about it.

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
    exporter, common = OTLPMetricExporter(timeout=5), attributes_of(base_url, model)
    ended = threading.Event()
    latest: dict[str, Any] = {}
    complained = False

    def send() -> None:
        nonlocal complained
        if not latest:
            return
        result = exporter.export(export_of(dict(latest), common, time.time_ns()))
        if result is not MetricExportResult.SUCCESS and not complained:
            complained = True
            say("telemetry was not delivered: check OTEL_EXPORTER_OTLP_ENDPOINT; the run goes on")

    def work() -> None:
        while not ended.wait(every_s):
            send()

    thread = threading.Thread(target=work, name="otel", daemon=True)
    thread.start()
    try:
        yield latest.update
    finally:
        ended.set()
        thread.join()
        send()
        exporter.shutdown()

"""Test OpenTelemetry: the names of its conventions, our counts, real OTLP over HTTP, nothing unless asked."""

from __future__ import annotations

import gzip
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harvester.observe import otel
from harvester.observe.counters import LATENCY_EDGES_S, TOKEN_EDGES
from harvester.observe.metrics import METRICS
from tests import commands
from tests.harvester.cli.test_progress import run_folder

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")


class Collector:
    """What an OTLP endpoint received."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                packed = self.headers.get("Content-Encoding") == "gzip"
                assert self.path == "/v1/metrics"
                collector.bodies.append(gzip.decompress(body) if packed else body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    result = Collector()
    yield result
    result.server.shutdown()
    result.server.server_close()


def run(path: Path, *flags: str, endpoint: str) -> subprocess.CompletedProcess[str]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "NO_PROXY": "*"}
    command = ["run", path, "--json", *flags]
    return commands.run("harvester", command, timeout=240, environment=environment)


def test_names_are_the_conventions(monkeypatch: pytest.MonkeyPatch):
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as names
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics as metrics

    ours = {metric.otel for metric in METRICS if metric.otel.startswith("gen_ai")}
    assert ours == {metrics.GEN_AI_CLIENT_OPERATION_DURATION, metrics.GEN_AI_CLIENT_TOKEN_USAGE}
    assert set(otel.attributes_of("https://api.example/v1", "m")) == {
        names.GEN_AI_OPERATION_NAME,
        names.GEN_AI_PROVIDER_NAME,
        names.GEN_AI_REQUEST_MODEL,
        "server.address",
        "server.port",
    }
    assert TOKEN_EDGES[:4] == (1, 4, 16, 64)
    assert TOKEN_EDGES[-1] == 67_108_864
    assert tuple(0.01 * 2**n for n in range(14)) == LATENCY_EDGES_S


def test_a_run_sends_its_counts_when_asked(tmp_path: Path, mock_teacher, collector: Collector):
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

    mock = mock_teacher(faults=[{"action": "status", "status": 503, "nth": 3}])
    path = run_folder(tmp_path, mock.base_url, 20)
    done = run(path, "--otel", endpoint=collector.address)
    assert done.returncode == 0, done.stderr
    request = ExportMetricsServiceRequest.FromString(collector.bodies[-1])
    (resource,) = request.resource_metrics
    result = {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}
    (duration,) = result["gen_ai.client.operation.duration"].histogram.data_points
    assert (duration.count, len(duration.bucket_counts)) == (20, 15)
    assert {a.key: a.value.string_value for a in duration.attributes}[
        "gen_ai.request.model"
    ] == "mock-teacher"
    usage = result["gen_ai.client.token.usage"].histogram.data_points
    kinds = {
        a.value.string_value for point in usage for a in point.attributes if a.key == "gen_ai.token.type"
    }
    assert (result["gen_ai.client.token.usage"].unit, kinds) == ("{token}", {"input", "output"})
    (failed,) = result["harvester.attempt.errors"].sum.data_points
    assert (failed.as_int, failed.attributes[0].value.string_value) == (1, "unavailable")
    assert result["harvester.answers"].sum.data_points[0].as_int == 20
    assert not any(b"What is" in body for body in collector.bodies)


def test_nothing_is_sent_unless_asked(tmp_path: Path, mock_teacher, collector: Collector):
    assert run(run_folder(tmp_path, mock_teacher().base_url, 3), endpoint=collector.address).returncode == 0
    assert collector.bodies == []


@pytest.mark.slow
def test_a_collector_that_is_away_ends_nothing(tmp_path: Path, mock_teacher):
    path = run_folder(tmp_path, mock_teacher().base_url, 3)
    done = run(path, "--otel", endpoint="http://127.0.0.1:9")
    assert done.returncode == 0
    assert json.loads(done.stdout)["answers_stored"] == 3
    assert "telemetry was not delivered" in done.stderr
    assert "Traceback" not in done.stderr

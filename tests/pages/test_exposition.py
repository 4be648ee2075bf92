"""Test the Prometheus text with Prometheus's own parser, its naming conventions, and the ledger."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import typer.main
from prometheus_client.parser import text_string_to_metric_families

from harvester.cli import main
from harvester.errors import ConfigError
from harvester.observe.report import prometheus, report
from tests import commands
from tests.faults import bench
from tests.harvester.cli.test_progress import run_folder
from tests.pages import hostile


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from harvester.mock_teacher.faults.script import read_rules
    from harvester.mock_teacher.running import start_in_thread
    from harvester.mock_teacher.settings import MockSettings

    faults = [{"action": "status", "status": 503, "nth": 4}]
    with start_in_thread(MockSettings(faults=read_rules(faults))) as mock:
        ended = bench.run_harvest(
            mock,
            tmp_path_factory.mktemp("run"),
            faults,
            prompts=[f"What is {n} + 1?" for n in range(20)],
            teacher={"price": {"input": 1000, "output": 1000}},
        )
    assert ended.fired == 1
    return ended.store


def families(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample name -> labels -> value."""
    result: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            result.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return result


def test_counters_are_the_ledgers(store: Path):
    series = families(prometheus.metrics_text(store))
    assert series["harvester_attempts_total"] == {(): 21}
    assert series["harvester_answers_total"] == {(("outcome", "ok"),): 20}
    assert series["harvester_attempt_errors_total"] == {(("code", "unavailable"),): 1}
    assert series["harvester_cost_dollars_total"][()] > 0
    assert series["harvester_rows_done"][("ending", "answered"),] == 20
    assert series["harvester_state"] == {(("state", "complete"),): 1}


def test_failed_rows_are_those_that_have_no_answer_now(tmp_path: Path, mock_teacher):
    mock = mock_teacher(faults=[{"action": "status", "status": 500, "times": 5}])
    path = run_folder(tmp_path, mock.base_url, 20)
    path.write_text(path.read_text() + "\n[run]\nmax_attempts = 1\n", encoding="utf-8")
    command = typer.main.get_command(main.app)
    for code, dead in ((3, 5), (0, 0)):
        assert command(["run", str(path)], standalone_mode=False) == code
        series = families(prometheus.metrics_text(tmp_path / "store"))
        assert series["harvester_failed_rows"] == {(): dead}
        tiles = report.overview(report.gather(tmp_path / "store"))["tiles"]
        assert [(t["value"], t["bad"]) for t in tiles if t["name"] == "failed rows"] == [
            (str(dead), dead > 0)
        ]
    assert mock.totals()["answers"] == 20


def test_histograms_are_cumulative_and_whole(store: Path):
    series = families(prometheus.metrics_text(store))
    cells = series["harvester_request_duration_seconds_bucket"]
    counts = [cells[key] for key in sorted(cells, key=lambda key: float(dict(key)["le"]))]
    assert counts == sorted(counts)
    assert counts[-1] == series["harvester_request_duration_seconds_count"][()] == 20
    assert series["harvester_request_duration_seconds_sum"][()] > 0
    assert series["harvester_usage_tokens_count"] == {(("type", "input"),): 20, (("type", "output"),): 20}


def test_names_follow_the_conventions(store: Path):
    bases = {
        "seconds",
        "bytes",
        "dollars",
        "ratio",
        "tokens",
        "requests",
        "attempts",
        "rows",
        "info",
        "total",
    }
    for family in text_string_to_metric_families(prometheus.metrics_text(store)):
        assert family.documentation
        assert re.fullmatch(r"harvester_[a-z_]+", family.name)
        assert family.type in {"counter", "gauge", "histogram"}
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        if family.name.endswith(("_s", "_ms", "_milliseconds", "_minutes", "_mib", "_usd", "_microusd")):
            pytest.fail(f"{family.name} is in no base unit")
        if family.type == "histogram":
            assert family.name.rsplit("_", 1)[1] in bases


def test_labels_are_escaped():
    for text in hostile.TEXTS:
        drawn = prometheus.family("m", "gauge", "about", [("", {"code": text}, 1.5)])
        (series,) = next(iter(text_string_to_metric_families(drawn))).samples
        assert series.labels["code"] == text.replace("\r", "\r")
        assert series.value == 1.5


def test_no_text_key_or_path_is_in_it(store: Path, hostile_store: Path):
    for entry in (store, hostile_store):
        text = prometheus.metrics_text(entry)
        assert str(entry) not in text
        assert "What is" not in text
        assert "<script" not in text


def test_the_textfile_is_whole_and_readable_by_the_collector(store: Path, tmp_path: Path):
    out = tmp_path / "harvest.prom"
    command = ["metrics", store, "--out", out]
    assert commands.run("harvester", command, timeout=240).returncode == 0
    assert families(out.read_text(encoding="utf-8"))["harvester_attempts_total"] == {(): 21}
    assert out.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["harvest.prom"]
    bad = commands.run("harvester", [*command[:-1], tmp_path / "no" / "x.prom"], timeout=240)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr


def test_a_run_keeps_its_textfile(tmp_path: Path, mock_teacher):
    path = run_folder(tmp_path, mock_teacher().base_url, 5)
    out = tmp_path / "run.prom"
    command = ["run", path, "--metrics-file", out]
    assert commands.run("harvester", command, timeout=240).returncode == 0
    assert families(out.read_text(encoding="utf-8"))["harvester_answers_total"] == {(("outcome", "ok"),): 5}
    written: list[Path] = []
    messages: list[str] = []
    again = tmp_path / "again"
    again.mkdir()
    with prometheus.updating_textfile(tmp_path / "store", again / "x.prom", messages.append, every_s=0.01):
        while not written:
            written = list(again.glob("x.prom"))
        assert messages == []
        shutil.rmtree(again)
        while not messages:
            pass
    assert len(messages) == 1  # once, though it could be written neither then nor at the end
    assert "No such file or directory" in messages[0]


UNFIT = {
    ".": "is a folder",
    "..": "is a folder",
    "/": "is a folder",
    "/proc/x.prom": "can't be written",
    "no/x.prom": "can't be written",
    "x" * 250: "can't be written",
    "x" * 300: "can't be written",
    "/dev/null": "is not a regular file",
    "STORE/journal.db": "the store's own",
    "STORE/shards/x.prom": "store's own",
}


def test_a_path_that_cant_be_written_is_reported_before_anything_is_sent(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mock_teacher
):
    monkeypatch.chdir(tmp_path)
    teacher = mock_teacher()
    path = run_folder(tmp_path, teacher.base_url, 2)
    verbs = (["run", str(path), "--metrics-file"], *([v, str(store), "--out"] for v in ("metrics", "report")))
    command = typer.main.get_command(main.app)
    for name, why in UNFIT.items():
        for verb in verbs[: 2 if name.startswith("no") else 3]:  # a report makes its folder
            out = name.replace("STORE", str(tmp_path / "store" if verb[0] == "run" else store))
            with pytest.raises(ConfigError) as caught:
                command([*verb, out], standalone_mode=False)
            assert why in str(caught.value)
    assert teacher.state()["received"] == 0

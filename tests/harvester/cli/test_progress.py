"""Test the progress display: bars on a terminal, else lines or JSON records; hostile text is escaped."""

from __future__ import annotations

import io
import json
import os
import pty
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harvester.cli import console
from harvester.observe import progress
from harvester.observe.status_line import status_line
from tests import commands
from tests.faults import bench
from tests.pages import hostile

STATUS: dict[str, Any] = {
    "state": "running",
    "model": "mock-teacher",
    "waiting": "requests per minute, 3 s",
    "rows_total": 5200,
    "from_cache": 112,
    "duplicates": 3,
    "answers_stored": 2694,
    "dead": 3,
    "retries": 17,
    "possibly_billed": 1,
    "errors": {"rate_limited": 5, "unavailable": 12},
    "in_flight": 24,
    "window": 32,
    "rates": {"requests_per_minute": 1230.0, "tokens_per_minute": 55_000.0},
    "limits": {"requests_per_minute": 1500, "tokens_per_minute": None},
    "refused_share": 0.012,
    "cost_microusd": 17_000,
    "budget": {"microusd": 50_000, "microusd_spent": 17_500, "tokens": None},
    "eta_s": {"low": 190.0, "likely": 210.0, "high": 250.0},
    "cost_projected_microusd": {"low": 31_000, "likely": 32_000, "high": 34_000},
}


def drawn(status: dict[str, Any], width: int = 100) -> str:
    out = Console(file=io.StringIO(), width=width, record=True, markup=False, highlight=False)
    out.print(progress.render("harvest", status, 754.0))
    return out.export_text()


def test_the_display_shows_rate_limits_cost_and_errors():
    shown = drawn(STATUS)
    for words in (
        "harvest  mock-teacher",
        "running  0:12:34",
        "2,812 of 5,200",
        "54%",
        "$0.0170 of $0.05",
        "35%",
        "1,230 requests/min of 1,500 (82%)",
        "1.2% refused (429)",
        "24 of a window of 32",
        "waiting: requests per minute, 3 s",
        "3.2 minutes to 4.2 minutes",
        "$0.0310 to $0.0340 in all",
        "3 failed",
        "unavailable 12, rate_limited 5",
    ):
        assert words in shown, shown
    assert len(shown.splitlines()) == 8


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_display_fits_the_terminal(width: int):
    budgets: list[dict[str, Any]] = [
        {},
        {"tokens": 1000, "tokens_spent": 2000},
        {"microusd": 1, "microusd_spent": 9},
    ]
    for budget in budgets:
        for status in ({}, {**STATUS, "budget": budget}):
            assert all(len(line) <= width for line in drawn(status, width).splitlines())


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_hostile_text_is_escaped(text: str):
    status = {
        **STATUS,
        "model": text,
        "waiting": text,
        "errors": {text: 1},
        "complaints": [text + "!"],
        "canary": {"changes": 1, "said": text},
    }
    for text_shown in (drawn(status, 400), status_line(status, 10)):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text_shown)
    assert len(drawn(status, 400).splitlines()) == 10


def run_folder(root: Path, base_url: str, rows: int) -> Path:
    prompts = [json.dumps({"prompt": f"What is {n} + 9?"}) + "\n" for n in range(rows)]
    (root / "p.jsonl").write_text("".join(prompts), encoding="utf-8")
    tables = {
        "teacher": {
            "base_url": base_url,
            "model": "mock-teacher",
            "terms": "mock-teacher",
            "price": {"input": 1, "output": 1},
        },
        "prompts": {"files": ["p.jsonl"]},
        "sampling": {"max_tokens": 64},
        "budget": {"usd": 1.0},
    }
    path = root / "harvest.toml"
    path.write_text("".join(bench.toml(name, table) for name, table in tables.items()), encoding="utf-8")
    return path


def test_a_run_on_a_terminal_draws_bars(tmp_path: Path, mock_teacher):
    path = run_folder(tmp_path, mock_teacher(latency_s=0.1).base_url, 60)
    ours, theirs = pty.openpty()
    process = commands.Command(
        "harvester",
        ["run", path, "--json"],
        stderr=theirs,
        environment={"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(theirs)
    screen = b""
    try:
        while chunk := os.read(ours, 65_536):
            screen += chunk
    except OSError:  # the other side is closed: EIO
        pass
    os.close(ours)
    summary = json.loads(process.communicate(timeout=240)[0])
    assert process.returncode == 0
    assert summary["answers_stored"] == 60
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    assert "60 of 60" in shown
    assert "of $1.00" in shown
    assert "━" in shown


def test_a_run_continues_when_its_terminal_closes(tmp_path: Path, mock_teacher):
    mock = mock_teacher(latency_s=0.1)
    path = run_folder(tmp_path, mock.base_url, 60)
    ours, theirs = pty.openpty()
    process = commands.Command(
        "harvester", ["run", path, "--json"], stderr=theirs, environment={"TERM": "xterm-256color"}
    )
    os.close(theirs)
    screen = b""
    while b"of 60" not in screen:
        screen += os.read(ours, 65_536)
    os.close(ours)
    summary = json.loads(process.communicate(timeout=240)[0])
    assert (process.returncode, summary["answers_stored"]) == (0, 60)


def test_a_run_without_a_terminal_prints_a_line(tmp_path: Path, mock_teacher):
    path = run_folder(tmp_path, mock_teacher().base_url, 20)
    done = commands.run("harvester", ["run", path], timeout=240)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("harvest:")]
    line = lines[-1]  # a slow machine prints more than one
    assert "20/20 rows" in line
    assert "of $1.00" in line
    assert "\x1b" not in done.stderr


def test_logs_are_json_records_on_request(tmp_path: Path, mock_teacher):
    path = run_folder(tmp_path, mock_teacher(latency_s=0.05).base_url, 60)
    command = ["run", path, "--log-json", "--limit", 40]
    done = commands.run("harvester", command, timeout=240)
    assert done.returncode == 10
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert {record["event"] for record in records} == {"message", "progress"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", r["at"]) for r in records)
    updates = [record for record in records if record["event"] == "progress"]
    assert set(console.PROGRESS_FIELDS) <= set(updates[-1])
    assert updates[-1]["answers_stored"] == 40
    assert updates[-1]["state"] != updates[0]["state"]
    path.write_text("nonsense", encoding="utf-8")
    failed = commands.run("harvester", command, timeout=240)
    assert failed.returncode == 2
    assert all(json.loads(line)["event"] == "message" for line in failed.stderr.splitlines())

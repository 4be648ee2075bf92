"""A canary key through every kind of fault at DEBUG: it is sent to its teacher and found nowhere else."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

CANARY = "sk-CANARY/+9f3a77c1=zz"
LOUD = (
    "import logging, runpy, sys\n"
    "logging.basicConfig(level=logging.DEBUG)\n"
    "sys.argv = ['harvester', *sys.argv[1:]]\n"
    "runpy.run_module('harvester', run_name='__main__')\n"
)
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
api_key_env = "CANARY_KEY"
[prompts]
files = ["a.jsonl"]
[sampling]
max_tokens = 64
[run]
deadline_s = 2
max_attempts = 2
max_failed = 1000
"""
# Faults of one row each: the run goes on after them. Those that stop a run come one by one below.
_ACTIONS = (
    "html error_200 null_content refusal no_usage empty_choices junk_json truncated_json invalid_utf8 "
    "deep_json lone_surrogate nul empty_body reset fin reset_body cut_body fin_headers garbage_status silence"
)
PASSING: tuple[dict[str, object], ...] = (
    *({"action": action} for action in _ACTIONS.split()),
    *({"action": "status", "status": status} for status in (500, 503, 400, 422, 408)),
)
STOPPING: tuple[dict[str, object], ...] = (
    *({"action": "status", "status": status} for status in (401, 402, 403, 404)),
    {"action": "redirect", "location": "http://127.0.0.1:9/elsewhere"},
    {"action": "status", "status": 429, "code": "insufficient_quota"},
)


def run(tmp_path: Path, base_url: str, prompts: list[str]) -> subprocess.CompletedProcess[bytes]:
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "harvest.toml").write_text(CONFIG.format(base_url=base_url), encoding="utf-8")
    command = [sys.executable, "-X", "dev", "-c", LOUD, "run", str(tmp_path / "harvest.toml")]
    environment = {**os.environ, "CANARY_KEY": CANARY, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, timeout=90, env=environment)


def disguises() -> list[bytes]:
    """The key as it is, and as it may hide: base64 at its three phases, percent-encoded, JSON-escaped."""
    raw = CANARY.encode()
    phases = [base64.b64encode(b"\0" * phase + raw)[4 * (phase > 0) : -4] for phase in range(3)]
    escaped = json.dumps(CANARY).strip('"').encode(), CANARY.replace("/", "\\/").encode()
    return [raw, raw[3:], *phases, quote(CANARY, safe="").encode(), *escaped, raw.hex().encode()]


def leaks(places: dict[str, bytes]) -> list[str]:
    return [f"{name}: {form!r}" for name, found in places.items() for form in disguises() if form in found]


def everything(tmp_path: Path, done: subprocess.CompletedProcess[bytes]) -> dict[str, bytes]:
    files = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    return {"stdout": done.stdout, "stderr": done.stderr, **files}


def test_the_scan_would_find_every_disguise(tmp_path: Path):
    for form in disguises():
        assert leaks({"x": b"before" + form + b"after"})


def test_a_run_through_all_passing_faults_leaks_nothing(tmp_path: Path, mock_teacher, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)
    faults = [{**fault, "prompt": f"fault {n:02d} "} for n, fault in enumerate(PASSING)]
    teacher = mock_teacher(require_key_env="CANARY_KEY", faults=faults)
    done = run(
        tmp_path,
        teacher.base_url,
        [f"fault {n:02d} What is 12 + 30?" for n in range(len(PASSING))] + ["What is 1 + 2?"],
    )
    assert done.returncode == 0, done.stderr[-2000:].decode()
    assert all(times > 0 for times in teacher.fired().values()), teacher.fired()
    assert b"DEBUG" in done.stderr, "the run was not loud"
    assert teacher.state()["statuses"].get("401") is None, "the key did not arrive"
    subprocess.run(
        [sys.executable, "-m", "harvester", "report", str(tmp_path / "store")],
        check=True,
        capture_output=True,
    )
    places = everything(tmp_path, done)
    assert "store/report.html" in places
    assert leaks(places) == []


@pytest.mark.parametrize(
    "fault", STOPPING, ids=lambda f: f"{f['action']}-{f.get('status', '')}{f.get('code', '')}"
)
def test_a_refusal_stops_and_leaks_nothing(tmp_path: Path, mock_teacher, fault: dict[str, object]):
    teacher = mock_teacher(faults=[fault])
    done = run(tmp_path, teacher.base_url, [f"What is 12 + {n}?" for n in range(30)])
    assert done.returncode == 4, done.stderr[-2000:].decode()
    assert sum(teacher.fired().values()) > 0
    assert b"Traceback" not in done.stderr
    assert leaks(everything(tmp_path, done)) == []

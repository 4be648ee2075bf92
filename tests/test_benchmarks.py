"""Run each benchmark for a short time; their figures are not checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import trainer_scale

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("throughput.py --case fast --rounds 1 --seconds 1 --own-server", "harvest, everything on"),
        ("cancelled.py --cancelled 200", "200 cancelled, then 64 of 64 served"),
        ("several_choices.py --prompts 10 --samples 4", "0 answers paid twice"),
        ("batches.py --prompts 20", "0 keys paid twice"),
        ("memory.py --prompts 2000 --in-flight 16 --own-server", "harvest, 2,000 rows"),
        ("large_run.py --rows 200 --prompts 2000", "100,000,000 prompts"),
        ("limit_share.py --case configured --seconds 4", "share of limit"),
        pytest.param("limit_share.py --case halved --seconds 6", "settled at", marks=pytest.mark.long),
    ],
)
def test_a_benchmark_runs(script: str, says: str) -> None:
    name, *flags = script.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_a_measured_program_that_fails_says_why() -> None:
    with pytest.raises(SystemExit) as failed:
        trainer_scale.measured("import sys; print('begun', flush=True); 1 / len(sys.argv[1])", "", "second")
    assert " second failed: 1\nbegun\n" in str(failed.value)
    assert str(failed.value).endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.long  # trains five times
def test_the_first_ten_minutes_on_a_gpu_walk_through_on_the_cpu(tmp_path: Path) -> None:
    script = BENCHMARKS / "gpu_first_light.sh"
    done = subprocess.run(
        ["bash", str(script), "--dry-run", "--out", str(tmp_path), "--work", str(tmp_path / "work")],
        capture_output=True,
        text=True,
        timeout=3700,
    )
    results = json.loads((tmp_path / "first_light.json").read_text(encoding="utf-8"))
    assert [result["stage"] for result in results if "result" not in result] == []
    assert done.returncode == 0, done.stderr


def test_a_stage_that_fails_or_hangs_is_written_down_and_the_next_ones_run(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import gpu_first_light as first, time
walk = first.Walk(Path({str(tmp_path)!r}), time.monotonic() + 600)
walk.stage("fails", lambda: walk.json_of(["-c", "import absent_module"], 60))
walk.stage("hangs", lambda: walk.json_of(["-c", "import time; time.sleep(600)"], 1))
walk.stage("works", lambda: walk.json_of(["-c", "print('text'); print('{{}}')"], 60))
walk.stage("is late", dict, needs_s=700)
assert walk.failed
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    results = {
        r.pop("stage"): r for r in json.loads((tmp_path / "first_light.json").read_text(encoding="utf-8"))
    }
    assert "No module named 'absent_module'" in results["fails"]["error"]
    assert results["hangs"]["error"] == "killed after 1 s"
    assert results["works"]["result"] == {}
    assert results["is late"] == {"skipped": "no time left"}


def test_a_walk_that_is_terminated_keeps_its_results_and_leaves_no_process(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
import gpu_first_light as first, signal, time
signal.signal(signal.SIGTERM, first.stop)
walk = first.Walk(Path({str(tmp_path)!r}), time.monotonic() + 600)
walk.stage("before", lambda: {{"tokens_per_s": 7}})
sleep = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
walk.stage("runs", lambda: walk.json_of(["-c", sleep], 600))
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as walk:
        pid_file = tmp_path / "pid"
        until = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        walk.send_signal(signal.SIGTERM)
    assert walk.returncode != 0
    before, runs = json.loads((tmp_path / "first_light.json").read_text(encoding="utf-8"))
    assert before["result"] == {"tokens_per_s": 7}
    assert runs == {"stage": "runs", "error": "stopped: Stopped"}
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)

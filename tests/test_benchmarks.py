"""Run each benchmark for a short time; their figures are not checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
        ("limit_share.py --case configured --seconds 4", "share of limit"),
        ("limit_share.py --case halved --seconds 6", "settled at"),
    ],
)
def test_a_benchmark_runs(script: str, says: str) -> None:
    name, *flags = script.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout

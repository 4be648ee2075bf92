"""Run a shortened soak: its bounds hold, and it reports when they don't."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_a_short_day_keeps_its_bounds():
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory slope" in done.stdout
    assert "BAD" not in done.stdout

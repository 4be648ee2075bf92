"""Check with mypy that programs which use the public API get its types."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.long  # mypy without its cache
def test_the_public_api_is_typed() -> None:
    """One run for both files, as mypy reads the whole package; the cache of `make types` serves it."""
    right, wrong = ROOT / "tests" / "typed_api.py", ROOT / "tests" / "typed_api_wrong.py"
    command = [sys.executable, "-m", "mypy", "--strict", str(right), str(wrong)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = wrong.read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    found = re.findall(r"^tests/typed_api(\w*)\.py:(\d+): error", done.stdout, flags=re.MULTILINE)
    assert {(name, int(number)) for name, number in found} == {("_wrong", number) for number in expected}
    assert "error:" not in re.sub(r"^tests/typed_api_wrong.*$", "", done.stdout, flags=re.MULTILINE)

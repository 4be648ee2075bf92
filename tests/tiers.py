"""Divide the tests: into the default suite and those marked `slow`, and among the test processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# Files whose tests take more than 10 s together, the longest first. A test process runs whole files.
LONGEST_FILES = (
    "tests/trainer/experiments/test_loop.py",
    "tests/test_benchmarks.py",
    "tests/hostile/test_replies.py",
    "tests/trainer/distil/test_distil.py",
    "tests/trainer/training/test_launch.py",
    "tests/journey/test_journey.py",
    "tests/trainer/publish/test_export.py",
    "tests/trainer/training/test_several_machines.py",
    "tests/trainer/training/test_faults_checkpoints.py",
    "tests/test_notebooks.py",
    "tests/trainer/training/test_memory.py",
    "tests/journey/test_systemd.py",
    "tests/test_docs.py",
    "tests/trainer/evaluation/test_audit.py",
    "tests/test_snippets.py",
    "tests/trainer/onpolicy/test_onpolicy.py",
    "tests/test_quality.py",
    "tests/trainer/experiments/test_curve.py",
    "tests/faults/test_limits.py",
    "tests/journey/test_long_job.py",
    "tests/trainer/training/test_methods.py",
    "tests/trainer/evaluation/test_preferences.py",
    "tests/harvester/store/test_repair.py",
    "tests/trainer/training/test_cuda_path.py",
)


def rest_is_slow(values: Iterable[Any], *, first: int) -> list[Any]:
    """Return the values as parameters; those after the `first` few carry `slow`.

    For cases that take one path through the code: the first show in `make test` that it works, and CI runs
    all of them.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        for number, value in enumerate(values)
        for marks in [() if number < first else pytest.mark.slow]
    ]

"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.faults.script import read_rules
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import EVERY_TASK, MockSettings
from tests.harvester import faulty_disk


@pytest.fixture(scope="session")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes a process's disk fail when it is preloaded; see `tests.harvester.faulty_disk`."""
    return faulty_disk.build(tmp_path_factory.mktemp("faults"))


def _check(mock: RunningMock) -> None:
    """A fault that breaks the mock itself is no test of anybody."""
    if not mock.is_stopped:
        assert mock.state()["errors"] == []


@pytest.fixture
def mock_teacher() -> Iterator[Callable[..., RunningMock]]:
    """Start mock teachers that end with the test.

    `mock_teacher(faults=[{"action": "status", "status": 503, "nth": 2}], accuracy=1.0, rpm=600)`:
    faults as rows of a fault script, accuracy as one number or by task, else fields of `MockSettings`.
    """
    with ExitStack() as stack:

        def start(
            *,
            faults: Sequence[Mapping[str, Any]] = (),
            accuracy: float | Mapping[str, float] = 0.95,
            **settings: Any,
        ) -> RunningMock:
            shares = accuracy if isinstance(accuracy, Mapping) else {EVERY_TASK: accuracy}
            chosen = MockSettings(faults=read_rules(faults), accuracy=shares, **settings)
            mock = stack.enter_context(start_in_thread(chosen))
            stack.callback(_check, mock)
            return mock

        yield start

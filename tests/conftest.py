"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from harvester.mock_teacher.faults.script import read_rules
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import EVERY_TASK, MockSettings
from tests import temporary_folder
from tests.harvester import faulty_disk
from tests.tiers import LONGEST_FILES

temporary_folder.use_memory()

# torch reads it when it is imported. The students of the tests are so small that a second thread only waits,
# and several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Runs share limits through a file in the user's state folder: tests have one of their own.
_STATE = tempfile.mkdtemp(prefix="harvester-state-")
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE
# Published stores are downloaded into the user's cache: likewise. No test meets a real cloud.
os.environ["XDG_CACHE_HOME"] = f"{_STATE}/cache"
for _name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "HF_TOKEN", "HF_ENDPOINT"))]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

# A shell that runs the tests in the background ignores SIGINT for them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline for an example and no complaint about slow ones: on a busy machine one may take seconds.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same examples each time, for CI: what a new one finds is rarely the fault of the change it would stop.
settings.register_profile("fixed", settings.get_profile("suite"), derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none of them is left when other processes end."""
    places = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Put back signal handlers after each test: commands that run in this process leave theirs.

    What a later test starts would inherit an ignored SIGTERM, and never end.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        return (yield)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def pytest_collection_finish() -> None:
    """Exempt what collection has loaded, torch and transformers above all, from garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the preload library that makes disk calls fail; see `tests.harvester.faulty_disk`."""
    return faulty_disk.build(tmp_path_factory.mktemp("faults"))


def _check(mock: RunningMock) -> None:
    """Fail a test whose fault script broke the mock teacher itself: such a test proves nothing."""
    if not mock.is_stopped:
        assert mock.state()["errors"] == []


@pytest.fixture
def mock_teacher(tmp_path: Path) -> Iterator[Callable[..., RunningMock]]:
    """Start mock teachers; they stop when the test ends.

    Example: `mock_teacher(faults=[{"action": "status", "status": 503, "nth": 2}], accuracy=1.0, rpm=600)`.
    `faults` takes rows of a fault script, `accuracy` one number or a number for each task; every other
    argument is a field of `MockSettings`. They end before `tmp_path` is removed, where their files may be.
    """
    del tmp_path  # fixtures end in the reverse order
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

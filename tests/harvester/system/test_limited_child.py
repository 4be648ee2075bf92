"""Calls with limits: what is slow ends, what only waits for a core does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from harvester.system.limited_child import LimitedChild


@pytest.fixture
def child() -> Iterator[LimitedChild]:
    child = LimitedChild(1 << 30)
    child.call("builtins:len", [], timeout_s=60)  # it has started
    yield child
    child._end()


def compute(seconds: float) -> float:
    """Use a core for so many seconds."""
    while time.process_time() < seconds:
        pass
    return time.process_time()


@contextmanager
def a_crowded_core(pid: int) -> Iterator[None]:
    """Leave a process an eighth of one core; each rival has a session, as some kernels share by sessions."""
    core = {min(os.sched_getaffinity(pid))}
    os.sched_setaffinity(pid, core)
    with ExitStack() as stack:
        for _ in range(7):
            rival = [sys.executable, "-S", "-c", "while True: pass"]
            process = stack.enter_context(subprocess.Popen(rival, start_new_session=True))
            stack.callback(process.kill)
            os.sched_setaffinity(process.pid, core)
        yield


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the kernel does not count waits")
def test_waiting_for_a_core_does_not_count(child: LimitedChild) -> None:
    assert child._process is not None
    used = child.call("time:process_time", timeout_s=60)
    with a_crowded_core(child._process.pid):
        began = time.monotonic()
        # With an eighth of a core it takes 1.6 s; it may take ten times its timeout on a busy machine.
        assert child.call(f"{__name__}:compute", used + 0.2, timeout_s=1.0) >= used + 0.2
    assert time.monotonic() - began > 1.0


@pytest.mark.parametrize("call", [("time:sleep", 60), (f"{__name__}:compute", 60)])
def test_sleeping_and_computing_count(child: LimitedChild, call: tuple[str, float]) -> None:
    with pytest.raises(TimeoutError):
        child.call(*call, timeout_s=0.2)
    assert child.call("builtins:len", [1], timeout_s=60) == 1

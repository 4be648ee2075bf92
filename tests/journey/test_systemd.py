"""The printed service under a real systemd, the first process of namespaces of its own.

Only in a container, as root: beside a systemd that runs the machine, a second one would touch its cgroups.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest

from harvester.mock_teacher.running import RunningMock
from tests.journey.run_process import harvester, write_folder

SYSTEMD = Path("/lib/systemd/systemd")
QUICKER = "[Service]\nRestartSec=1\nWatchdogSec=10\n"
SERVICE = "harvest-x.service"
TARGETS = ("default", "sysinit", "basic", "network-online", "shutdown", "timers", "time-sync", "time-set")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SYSTEMD.exists() or shutil.which("nsenter") is None or os.geteuid() != 0,
        reason="needs systemd, util-linux and root",
    ),
    pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="a systemd runs this machine"),
]
SYSTEMCTL = ("systemctl", "--no-pager")
Run = Callable[..., subprocess.CompletedProcess[str]]


@contextmanager
def systemd(units: Path) -> Iterator[Run]:
    """A systemd that knows these units and no other; gives what runs a command beside it."""
    begin = (
        "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mkdir /run/systemd && exec env -i"
        f" PATH=$PATH SYSTEMD_UNIT_PATH={units} {SYSTEMD} --system --unit=default.target"
    )
    flags = ("--fork", "--pid", "--mount", "--mount-proc", "--ipc", "--kill-child")
    with subprocess.Popen(
        ["unshare", *flags, "bash", "-c", begin], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            inside = ["nsenter", "-t", str(_child(process)), "-m", "-p", "-i"]

            def run(*words: object) -> subprocess.CompletedProcess[str]:
                command = [*inside, *map(str, words)]
                return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

            _until(lambda: run(*SYSTEMCTL, "is-active", "default.target").stdout.strip() == "active", 240)
            yield run
            run(*SYSTEMCTL, "stop", SERVICE)
        finally:
            process.kill()
    _until(_cgroups_are_gone, 240)


def _cgroups_are_gone() -> bool:
    """What the killed systemd left behind, removed as soon as nothing lives in it."""
    result = [*Path("/sys/fs/cgroup").glob("*/init.scope"), *Path("/sys/fs/cgroup").glob("*/system.slice")]
    for place in result:
        subprocess.run(
            ["find", place, "-depth", "-type", "d", "-exec", "rmdir", "{}", ";"], capture_output=True
        )
    return not any(place.exists() for place in result)


def _child(process: subprocess.Popen[bytes]) -> int:
    """Process 1 of the new namespace, by its number out here."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    _until(lambda: path.exists() and path.read_text().strip() != "", 240)
    return int(path.read_text().split()[0])


def _until(claim: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < deadline, "systemd did not come to it"
        time.sleep(0.1)


def _empty_targets(folder: Path) -> Path:
    units = folder / "units"
    units.mkdir()
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDescription=empty\nDefaultDependencies=no\n")
    return units


def test_a_detached_run_gets_a_scope_of_its_own(
    mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = mock_teacher(slots=1, slot_s=0.1)
    config = write_folder(tmp_path, mock.base_url, 5000)
    with systemd(_empty_targets(tmp_path)) as run:
        command = partial(run, sys.executable, "-m", "harvester")
        started = command("run", config, "--detach", "--json")
        assert started.returncode == 0, started.stderr
        facts = json.loads(started.stdout)
        scope = facts["unit"]
        assert run(*SYSTEMCTL, "show", "-P", "ActiveState", scope).stdout.strip() == "active"
        group = run(*SYSTEMCTL, "show", "-P", "ControlGroup", scope).stdout.strip()
        assert str(facts["pid"]) in run(
            "cat", f"/sys/fs/cgroup/systemd{group}/cgroup.procs"
        ).stdout.split() + (run("cat", f"/sys/fs/cgroup{group}/cgroup.procs").stdout.split())
        refused = command("run", config, "--detach")
        assert (refused.returncode, "error[locked]" in refused.stderr) == (75, True)
        assert run(*SYSTEMCTL, "stop", scope).returncode == 0  # SIGTERM: it drains
        ended = command("attach", tmp_path / "store")
        assert (ended.returncode, "exit code 143" in ended.stdout) == (143, True)


def test_the_service_starts_fails_and_restarts_as_its_unit_says(
    mock_teacher: Callable[..., RunningMock], tmp_path: Path
) -> None:
    mock = mock_teacher(latency_s=0.05)
    hours = '[schedule]\nhours = ["00:00-24:00 UTC"]'
    limits = "limits = { requests_per_minute = 600 }"
    config = write_folder(tmp_path, mock.base_url, 5000, teacher=limits, more=hours)
    content = config.read_text()
    units = _empty_targets(tmp_path)
    (units / f"{SERVICE}.d").mkdir(parents=True)
    (units / f"{SERVICE}.d" / "quicker.conf").write_text(QUICKER)
    printed = harvester("schedule", config, "--systemd", "--name", "harvest-x").stdout
    for part in printed.split("# ---- ")[1:]:
        name, _, text = part.partition("\n")
        (units / name.strip()).write_text(text)

    with systemd(units) as run:
        systemctl = partial(run, *SYSTEMCTL)

        def shown(name: str) -> str:
            return systemctl("show", "-P", name, SERVICE).stdout.strip()

        def restarted(times: int) -> bool:
            return (shown("NRestarts"), shown("ActiveState")) == (str(times), "active")

        assert systemctl("start", "harvest-x.timer").returncode == 0
        assert "harvest-x.timer" in systemctl("list-timers").stdout
        started = systemctl("start", SERVICE)  # comes back when it said READY
        assert started.returncode == 0, started.stderr
        _until(lambda: "600 (" in shown("StatusText"), 240)
        assert shown("ActiveState") == "active"

        def send(number: signal.Signals) -> None:
            assert systemctl("kill", "--kill-whom=main", "-s", number.name, SERVICE).returncode == 0

        send(signal.SIGSTOP)  # hangs: the watchdog ends it, and it begins anew
        _until(lambda: restarted(1), 240)
        send(signal.SIGKILL)
        _until(lambda: restarted(2), 240)
        assert systemctl("stop", SERVICE).returncode == 0
        assert (shown("Result"), shown("ExecMainStatus")) == ("success", "143")

        config.write_text(content.replace('terms = "mock-teacher"', 'terms = "openai"'))
        assert systemctl("start", SERVICE).returncode != 0
        assert (shown("ActiveState"), shown("ExecMainStatus"), shown("NRestarts")) == ("failed", "77", "0")
        systemctl("reset-failed", SERVICE)

        # Hours are in whole minutes: they close in 40 s at the earliest, when the service has started.
        now = datetime.now(UTC)
        closes = now + timedelta(minutes=1, seconds=40)
        closing = f"{now - timedelta(minutes=5):%H:%M}-{closes:%H:%M} UTC"
        config.write_text(content.replace("00:00-24:00 UTC", closing))
        assert systemctl("start", SERVICE).returncode == 0
        _until(lambda: shown("ActiveState") == "inactive", 240)
        assert (shown("Result"), shown("ExecMainStatus")) == ("success", "10")
    ledger = mock.totals()
    assert ledger["requests"] - ledger["bodies"] <= 2 * 64  # the two that died had so many in flight at most

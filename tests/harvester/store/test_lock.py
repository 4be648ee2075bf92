"""One process per store, proven with real processes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harvester.errors import StoreError, StoreLocked
from harvester.store.journal import lock

HOLD = (
    "import sys, time; from pathlib import Path; from harvester.store.journal.lock import StoreLock\n"
    "with StoreLock(Path(sys.argv[1]), started_at=0.0):\n"
    "    print('held', flush=True); sys.stdin.read()"
)


def holder(store: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_name_of_the_holder(tmp_path: Path):
    process = holder(tmp_path)
    assert lock.is_held(tmp_path)
    with pytest.raises(StoreLocked) as caught, lock.StoreLock(tmp_path, started_at=0.0):
        pass
    assert caught.value.exit_code == 75
    assert f"pid {process.pid} on {os.uname().nodename}" in str(caught.value)
    process.communicate(timeout=240)
    assert not lock.is_held(tmp_path)


def test_a_lock_file_removed_under_its_holder_does_not_free_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lock, "PATIENCE_S", 0.0)
    with lock.StoreLock(tmp_path, started_at=0.0):
        (tmp_path / "LOCK").unlink()
        assert lock.is_held(tmp_path)
        for _ in range(2):  # the first try makes another LOCK
            with pytest.raises(StoreLocked), lock.StoreLock(tmp_path, started_at=0.0):
                pass
        assert lock.is_held(tmp_path)
    assert not lock.is_held(tmp_path)


def test_a_look_at_the_lock_keeps_no_process_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "LOCK").touch()
    asking = [os.open(path, os.O_RDONLY) for path in (tmp_path / "LOCK", tmp_path)]
    for handle in asking:
        fcntl.flock(handle, fcntl.LOCK_SH)
    waits: list[float] = []

    def wait(seconds: float) -> None:  # the asker is done after the second look
        waits.append(seconds)
        if len(waits) % 2 == 0:
            os.close(asking.pop(0))

    monkeypatch.setattr(lock.time, "sleep", wait)
    with lock.StoreLock(tmp_path, started_at=0.0):
        assert len(waits) == 4


def test_a_killed_holder_leaves_no_stale_lock(tmp_path: Path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=240)
    with lock.StoreLock(tmp_path, started_at=0.0):
        assert lock.read_holder(tmp_path / "LOCK")["pid"] == os.getpid()
        assert oct((tmp_path / "LOCK").stat().st_mode)[-3:] == "600"


def test_a_folder_that_cannot_be_made_is_a_storage_fault(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError) as caught, lock.StoreLock(tmp_path / "file" / "store", started_at=0.0):
        pass
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_network_file_systems_are_refused(tmp_path: Path, kind: str):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        f"2 1 0:9 / {tmp_path}/net rw,relatime shared:1 - {kind} server:/x rw\n"
        f"3 2 8:2 / {tmp_path}/net/local rw - xfs /dev/sdb rw\n"
    )
    (tmp_path / "net" / "local").mkdir(parents=True)
    assert lock.file_system_of(tmp_path, mounts) == "ext4"
    with pytest.raises(StoreError, match=kind):
        lock.refuse_network_file_system(tmp_path / "net", mounts)
    lock.refuse_network_file_system(tmp_path / "net" / "local", mounts)

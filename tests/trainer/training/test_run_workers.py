"""Test that several processes end together: signals are forwarded, a failure ends all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from tests.waiting import until
from trainer import process
from trainer.errors import ProcessLost
from trainer.training import launch

# A worker that ends with 128 + number on a signal, after writing its rank's file: pid and signal.
WORKER = """
import os, signal, sys, time
rank, folder = os.environ["RANK"], sys.argv[1]
def stop(number, frame):
    open(f"{folder}/stopped{rank}", "w").write(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
open(f"{folder}/.{rank}", "w").write(str(os.getpid()))
os.rename(f"{folder}/.{rank}", f"{folder}/pid{rank}")
deadline = time.time() + 300
while len([n for n in os.listdir(folder) if n.startswith("pid")]) < int(os.environ["WORLD_SIZE"]):
    assert time.time() < deadline
    time.sleep(0.01)
"""
WAIT = "time.sleep(600)\n"


def command(folder: Path, code: str) -> list[str]:
    script = folder / "worker.py"
    script.write_text(WORKER + textwrap.dedent(code))
    return [sys.executable, "-S", str(script), str(folder)]


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid*"))]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def launcher(folder: Path, code: str, count: int = 2) -> subprocess.Popen[str]:
    """`run_workers` in a process of its own, as a shell or a container would start it."""
    call = f"launch.run_workers({command(folder, code)!r}, {count}, print)"
    run = f"from trainer.training import launch; raise SystemExit({call})"
    return subprocess.Popen([sys.executable, "-c", run], text=True, stderr=subprocess.PIPE, cwd=Path.cwd())


def test_all_succeed(tmp_path):
    assert launch.run_workers(command(tmp_path, ""), 2, print) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_reaches_every_worker_and_none_stays(tmp_path, number):
    running = launcher(tmp_path, WAIT, 3)
    until(lambda: len(pids(tmp_path)) == 3)
    running.send_signal(number)
    running.communicate(timeout=240)
    assert running.returncode == 128 + number
    assert [(tmp_path / f"stopped{rank}").read_text() for rank in range(3)] == [str(int(number))] * 3
    assert not any(map(alive, pids(tmp_path)))


def test_a_worker_that_is_killed_ends_all_and_is_named(tmp_path):
    code = """
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    """
    with pytest.raises(ProcessLost, match=r"process 1 of 2 .* signal 9") as lost:
        launch.run_workers(command(tmp_path, code), 2, print)
    assert lost.value.exit_code == 75
    assert (tmp_path / "stopped0").read_text() == str(int(signal.SIGTERM))
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_fails_by_itself_gives_the_exit_code_and_its_words(tmp_path, rank):
    code = f"""
    if rank == "{rank}":
        print("error[memory]: a pack does not fit", file=sys.stderr)
        sys.exit(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # what a rank says that lost its peer
    time.sleep(600)
    """
    lines: list[str] = []
    assert launch.run_workers(command(tmp_path, code), 2, lines.append) == 1
    assert any("a pack does not fit" in line for line in lines) == (rank == 1)  # rank 0 prints by itself


def test_workers_that_do_not_end_are_killed_after_the_grace(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE_S", 0.3)
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(f"{folder}/ready{rank}", "w").close()
    if rank == "0":
        while not os.path.exists(f"{folder}/ready1"):
            time.sleep(0.01)
        sys.exit(3)
    time.sleep(600)
    open(f"{folder}/ended{rank}", "w").close()
    """
    assert launch.run_workers(command(tmp_path, code), 2, print) == 3
    assert (tmp_path / "ready1").exists()  # it ignored SIGTERM before it could get one
    assert not (tmp_path / "stopped1").exists()
    assert not (tmp_path / "ended1").exists()  # nor did it end by itself: it was killed
    assert not any(map(alive, pids(tmp_path)))


def test_a_second_signal_ends_workers_that_hang(tmp_path):
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(f'{folder}/ready{rank}', 'w')\ntime.sleep(600)\n"
    )
    running = launcher(tmp_path, code)
    until(lambda: len(list(tmp_path.glob("ready*"))) == 2)
    running.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert running.poll() is None  # a step may take long: one signal sets no limit
    running.send_signal(signal.SIGINT)
    running.communicate(timeout=240)
    assert running.returncode == 143
    assert not any(map(alive, pids(tmp_path)))


def test_what_a_scheduler_sends_again_at_once_is_no_second_wish(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(launch.time, "monotonic", lambda: now[0])
    with launch._collected_signals() as received:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        now[0] += process.ECHO_S + 1
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_one_of_several_processes_takes_signals_at_once_for_one(monkeypatch, processes):
    """A scheduler signals every process of a job, and the launcher forwards its own signal."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    now = [100.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    with process.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        if processes == "1":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
            return
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        now[0] += process.ECHO_S + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_workers_of_a_killed_launcher_do_not_outlive_it(tmp_path):
    running = launcher(tmp_path, WAIT)
    until(lambda: len(pids(tmp_path)) == 2)
    running.kill()
    running.communicate(timeout=240)
    until(lambda: not any(map(alive, pids(tmp_path))))


def as_first_process(words: list[str]) -> list[str] | None:
    """Words that run a command as process 1 of a new namespace; None where that is not permitted."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0:
        unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    try:
        tried = subprocess.run([*unshare, "true"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [*unshare, *words] if tried.returncode == 0 else None


@pytest.mark.parametrize("verb", ["--help", "train"])
def test_process_1_of_a_container_hears_sigterm(tmp_path, verb):
    """The kernel drops signals that process 1 has no handler for."""
    code = (
        "import os, signal, sys\n"
        "from trainer.cli import main as cli\n"
        "cli.app = lambda **_: os.kill(os.getpid(), signal.SIGTERM) or sys.exit(99)\n"
        "cli.main()\n"
    )
    if verb == "train":
        code = (
            "import os, signal, sys, threading\n"
            "from trainer.training import launch\n"
            "threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
            f"sys.exit(launch.run_workers({command(tmp_path, WAIT)!r}, 2, print))\n"
        )
    words = as_first_process([sys.executable, "-c", code])
    if words is None:
        pytest.skip("no new process namespace here")
    ended = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, cwd=Path.cwd())
    assert ended.returncode == 143, ended.stderr


def test_a_fleet_prints_its_result_once_as_text(tmp_path, fork_server):
    """Two real ranks without --json: the first one prints lines for people, notes included."""
    shape = {"batch_tokens": 512, "pack_tokens": 128, "max_steps": 1}
    path = tiny.train_toml(tmp_path, tiny.skill(24, held_out=2), train=shape)
    printed = fork_server("command", words=["train", path], world=2)
    assert printed["code"] == 0, printed["err"]
    lines = printed["err"].splitlines()  # stdout and stderr of both
    assert sum(line.startswith("adapter in ") for line in lines) == 1
    assert "cpu, base float32, adapter float32" in lines
    assert not any(line.startswith("{") for line in lines)


@pytest.mark.parametrize("flags", [(), ("--json",), ("--allow-change", "--force-faults", "--json")])
def test_the_launcher_passes_on_the_options_that_were_given(run_trainer, toml, monkeypatch, flags):  # noqa: F811
    commands = []
    monkeypatch.setattr(launch, "run_workers", lambda command, *_: commands.append(command) or 0)
    code, out, _ = run_trainer("train", toml, "--processes", 2, *flags)
    assert (code, out) == (0, "")
    given = ["train", str(toml), "--processes", "1", "--nnodes", "1", *flags]
    assert commands == [[sys.executable, "-m", "trainer", *given]]

"""Test that the launchers of two machines, here processes on loopback, start, stop and fail together."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.training.test_run_workers import WAIT, alive, command, pids
from tests.waiting import until
from trainer.errors import ProcessLost
from trainer.training.nodes import Ending, verdict

FAILS = 'if rank == "3":\n    sys.exit(1)\n'
KILLED = 'if rank == "2":\n    os.kill(os.getpid(), signal.SIGKILL)\n'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Machines:
    """Launchers of two machines with two workers each, forked from the server of this session."""

    def __init__(self, folder: Path, code: str, server: Any, *, backend: str = "static") -> None:
        self.folder = folder
        words = command(folder, f"open(folder + '/env' + rank, 'w').write(str(dict(os.environ)))\n{code}")
        port = free_port()
        self.ends: dict[int, dict[str, Any]] = {}
        self._threads = []
        for number in range(2):
            told = {
                "options": {
                    "nodes": 2,
                    "node": number if backend == "static" else None,
                    "backend": backend,
                    "endpoint": f"127.0.0.1:{port}",
                    "run_id": "test",
                    "join_s": 60.0,
                },
                "worker": words,
                "processes": 2,
                "lost_after_s": 3.0,
                "pid_file": str(folder / f"launcher{number}"),
            }
            self._threads.append(threading.Thread(target=self._run, args=(number, server, told)))
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, server: Any, told: dict[str, Any]) -> None:
        with server() as ask:
            self.ends[number] = ask("node", **told)

    def wait_for_workers(self) -> None:
        until(lambda: len(pids(self.folder)) == 4, 60)

    def launcher(self, number: int) -> int:
        return int((self.folder / f"launcher{number}").read_text())

    def wait(self) -> list[dict[str, Any]]:
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()
        assert not any(map(alive, pids(self.folder)))
        return [self.ends[number] for number in range(2)]


@pytest.mark.parametrize("backend", ["static", "c10d"])
def test_two_machines_number_their_processes_and_succeed(tmp_path, fork_connection, backend):
    ends = Machines(tmp_path, "", fork_connection, backend=backend).wait()
    assert [end["code"] for end in ends] == [0, 0], ends
    assert len(pids(tmp_path)) == 4
    for rank in range(4):
        environment = eval((tmp_path / f"env{rank}").read_text())
        assert (environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == (str(rank % 2), "4")
        assert environment["LOCAL_WORLD_SIZE"] == "2"
    assert len({eval((tmp_path / f"env{rank}").read_text())["MASTER_PORT"] for rank in range(4)}) == 1
    said = "".join(end["err"] for end in ends)
    assert "node 0 of 2: processes 0 to 1 of 4" in said
    assert "node 1 of 2: processes 2 to 3 of 4" in said


def test_a_failure_on_one_machine_ends_the_other_with_its_exit_code(tmp_path, fork_connection):
    machines = Machines(tmp_path, FAILS + WAIT, fork_connection)
    assert [end["code"] for end in machines.wait()] == [1, 1]
    assert {(tmp_path / f"stopped{rank}").read_text() for rank in range(3)} == {str(int(signal.SIGTERM))}


def test_a_killed_worker_is_named_on_both_machines(tmp_path, fork_connection):
    ends = Machines(tmp_path, KILLED + WAIT, fork_connection).wait()
    assert [end["code"] for end in ends] == [75, 75]
    for end in ends:
        assert "error[lost]: node 1 of 2: process 2 of 4 was ended by signal 9" in end["err"]


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_machine_that_dies_ends_the_other(tmp_path, fork_connection, number):
    """Node 0 holds the store, the other one does not."""
    machines = Machines(tmp_path, WAIT, fork_connection)
    machines.wait_for_workers()
    os.kill(machines.launcher(number), signal.SIGKILL)
    ends = machines.wait()
    assert ends[number]["signal"] == signal.SIGKILL
    assert ends[1 - number]["code"] == 75
    assert "error[lost]: " in ends[1 - number]["err"]
    assert ("out of reach" if number == 0 else "no sign of life") in ends[1 - number]["err"]


@pytest.mark.slow
def test_a_machine_that_never_comes_is_named(tmp_path, fork_server):
    options = {
        "nodes": 2,
        "node": 0,
        "backend": "static",
        "endpoint": f"127.0.0.1:{free_port()}",
        "join_s": 2.0,
    }
    end = fork_server("node", options=options, worker=command(tmp_path, ""), processes=2)
    assert end["code"] == 75
    assert "2 nodes did not come together within 2 s" in end["err"]
    assert pids(tmp_path) == []


LOST = Ending(75, message="process 1 of 4 was ended by signal 9")


@pytest.mark.parametrize(
    ("endings", "lost", "code"),
    [
        ([Ending(0), Ending(0)], "", 0),
        ([Ending(75), Ending(1, by_itself=True)], "", 1),
        ([LOST, Ending(1, by_itself=True)], "", 1),
        ([Ending(143, received=15), Ending(143)], "", 143),
        ([Ending(143), Ending(143, received=15)], "", 143),
        ([Ending(143), Ending(130, received=2)], "", 130),
        ([Ending(75), Ending(75)], "", 75),  # another training holds the folder: its own message says so
        ([Ending(1, by_itself=True)], "node 1 gives no sign of life", 1),
    ],
)
def test_the_verdict_is_the_first_cause(endings, lost, code):
    assert verdict(dict(enumerate(endings)), 2, lost) == code


@pytest.mark.parametrize(
    ("endings", "lost", "words"),
    [
        ([Ending(75), LOST], "", "node 1 of 2: process 1 of 4"),
        ([Ending(75)], "node 1 of 2 gives no sign of life", "no sign of life"),
        ([Ending(0)], "node 1 of 2 gives no sign of life", "no sign of life"),
    ],
)
def test_a_lost_process_is_an_error_by_name(endings, lost, words):
    with pytest.raises(ProcessLost, match=words):
        verdict(dict(enumerate(endings)), 2, lost)

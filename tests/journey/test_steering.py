"""A running harvest, controlled from another terminal: status, pause, resume, set, stop over its socket."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harvester.cli.status import stop
from harvester.errors import ConfigError, FindingsError
from harvester.mock_teacher.running import RunningMock
from harvester.observe.status import current_status, status_lines
from harvester.run.control import client, protocol, server
from harvester.store import paths
from harvester.store.journal.lock import StoreLock, is_held
from tests.journey.run_process import harvester, running, write_folder

Mock = Callable[..., RunningMock]
LIMITED = "[teacher.limits]\nrequests_per_minute = 1200\nmax_concurrency = 4\n"
PRICED = "[teacher.price]\ninput = 1.0\noutput = 2.0\n"


@pytest.mark.slow
def test_a_job_is_looked_at_held_retuned_and_stopped(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.02)
    config = write_folder(tmp_path, mock.base_url, 2000, teacher=LIMITED + PRICED)
    store = tmp_path / "store"
    with running(config) as run:
        run.until(lambda s: s["answers_stored"] >= 20)
        assert stat.S_IMODE((store / paths.CONTROL_SOCKET).stat().st_mode) == 0o600

        done = harvester("status", store, "--json", "--check", "--max-age", "10m")
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert (seen["state"], seen["alive"], seen["pid"]) == ("running", True, run.process.pid)
        assert seen["limits"]["requests_per_minute"] == 1200
        assert seen["rows_left"] == 2000 - seen["answers_stored"]
        run.until(lambda s: s["waiting"].startswith("requests per minute"))
        busy = run.until(lambda s: s["rates"]["requests_per_minute"] > 0 and s["eta_s"])
        assert 0 < busy["eta_s"]["low"] <= busy["eta_s"]["likely"] <= busy["eta_s"]["high"]
        assert busy["cost_projected_microusd"]["high"] > busy["cost_microusd"] > 0

        assert "paused" in client.tell(store, "pause")["said"]
        held = run.until(lambda s: s["state"] == "on hold" and s["in_flight"] == 0)
        assert held["waiting"].startswith("paused by the operator")
        sent = mock.state()["received"]
        assert harvester("status", store).stdout.startswith("on hold:")
        assert client.tell(store, "set", name="rpm", value="6000")["said"].startswith("rpm is 6,000")
        assert client.tell(store, "set", name="tpm", value="none")["said"].startswith("tpm has no")
        client.tell(store, "set", name="max-concurrency", value="16")
        client.tell(store, "set", name="budget", value="$7.50")
        client.tell(store, "set", name="budget", value="3,000,000tokens")
        assert mock.state()["received"] == sent

        client.tell(store, "resume")
        changed = run.until(lambda s: s["state"] == "running" and s["limits"]["max_concurrency"] == 16)
        assert changed["limits"]["requests_per_minute"] == 6000
        assert (changed["budget"]["microusd"], changed["budget"]["tokens"]) == (7_500_000, 3_000_000)
        run.until(lambda s: s["answers_stored"] > held["answers_stored"])
        client.tell(store, "set", name="rpm", value="30")
        slow = run.until(lambda s: s["limits"]["requests_per_minute"] == 30)
        assert slow["rows_left"] > 0
        assert slow["eta_s"]["low"] >= 2 * slow["rows_left"]

        stopped = harvester("stop", store)
        assert stopped.returncode == 0, stopped.stderr
        code, out, _ = run.end()
        assert code == 10
        assert f"resume with: harvester run {config}" in out
    assert not (store / paths.CONTROL_SOCKET).exists()
    status = current_status(store)
    assert (status["state"], status["alive"], status["exit_code"]) == ("stopped", False, 10)
    assert status["held"] == mock.totals()["answers"]
    assert harvester("pause", store).returncode == 1


@pytest.mark.slow  # many commands
def test_what_cant_be_set_is_refused_in_words_and_changes_nothing(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.1)
    config = write_folder(tmp_path, mock.base_url, 500, teacher=LIMITED)
    store = tmp_path / "store"
    with running(config) as run:
        before = run.until(lambda s: s["answers_stored"] > 0)["limits"]
        for name, value in (
            ("rpm", "fast"),
            ("rpm", "0"),
            ("rpm", "nan"),
            ("tpm", "-3"),
            ("max-concurrency", "0"),
            ("max-concurrency", "2.5"),
            ("budget", "5"),
            ("budget", "much"),
            ("colour", "red"),
            ("budget", "9" * 400),
            ("budget", "9" * 400 + "tokens"),
            ("rpm", "1e-10"),
            ("tpm", "0.05"),
        ):
            with pytest.raises(ConfigError):
                client.ask(store, "set", name=name, value=value)
        asked_at = time.time()
        with pytest.raises(ConfigError, match="unknown verb"):
            client.ask(store, "dance")
        for line in (b"[1]\n", b"nonsense\n", b"[" * 60_000 + b"\n"):
            with socket.socket(socket.AF_UNIX) as raw, protocol.socket_address(store) as path:
                raw.connect(path)
                raw.sendall(line)
                assert b"error" in raw.recv(4096)
        after = run.until(lambda s: s["updated_at"] > asked_at)["limits"]
        assert after == before
        wrong = harvester("set", store, "rpm", "fast")
        assert (wrong.returncode, "not a number" in wrong.stderr) == (2, True)


def test_a_ceiling_lowered_below_what_was_spent_ends_the_run(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(latency_s=0.02)
    config = write_folder(tmp_path, mock.base_url, 2000, teacher=LIMITED + PRICED)
    with running(config) as run:
        run.until(lambda s: s["answers_stored"] >= 10)
        client.tell(run.store, "set", name="budget", value="10tokens")
        code, out, _ = run.end()
    assert code == 10
    assert out.startswith("budget:")


@pytest.mark.slow  # 3 s of waiting
def test_a_dead_job_is_distinguished_from_a_hung_one_and_its_pause_outlives_it(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    mock = mock_teacher(latency_s=0.05)
    config = write_folder(tmp_path, mock.base_url, 2000, teacher=LIMITED)
    store = tmp_path / "store"
    with running(config) as run:
        run.until(lambda s: s["answers_stored"] > 0)
        assert "also after a restart" in client.tell(store, "pause")["said"]
        run.signal(signal.SIGSTOP)
        assert client.ask(store, "status", patience_s=0.2) is None
        stopped = current_status(store)
        assert (stopped["alive"], stopped["process"]) == (True, "stopped")
        with pytest.raises(FindingsError, match="does not answer"):
            client.tell(store, "pause", patience_s=0.2)
        status = json.loads((store / "status.json").read_text())
        (store / "status.json").write_text(json.dumps({**status, "updated_at": status["updated_at"] - 900}))
        probe = harvester("status", store, "--check", "--max-age", "10m")
        assert (probe.returncode, probe.stdout.startswith("hung:")) == (1, True)
        assert "the run hangs (stopped)" in probe.stderr
        run.signal(signal.SIGKILL)
        run.process.wait()
    dead = current_status(store)
    assert (dead["state"], dead["alive"]) == ("died", False)
    assert (store / paths.CONTROL_SOCKET).exists()  # left behind; the next life takes its place
    probe = harvester("status", store, "--check")
    assert (probe.returncode, "no run is active: died" in probe.stderr) == (1, True)
    assert any(line.startswith("process   none") for line in status_lines(dead))
    assert any(line.startswith("on hold   the next run sends nothing") for line in status_lines(dead))
    sent = mock.state()["received"]
    with running(config, "--max-runtime", "1s") as run:  # as a timer starts it
        code, out, _ = run.end()
    assert (code, mock.state()["received"]) == (10, sent)
    assert "note: the next run sends nothing: paused by the operator" in out
    with running(config, "--limit", 5) as run:
        held = run.until(lambda s: s["state"] == "on hold" and s["waiting"])
        assert held["waiting"].startswith("paused by the operator")
        assert (held["requests_sent"], mock.state()["received"]) == (0, sent)
        assert client.tell(store, "resume")["said"] == "resumed"
        assert run.end()[0] == 10
    assert current_status(store)["holds"] == {}


def test_a_store_with_a_long_name_is_steered_too(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    assert len(os.fsencode(deep / paths.CONTROL_SOCKET)) > 108

    async def act(command: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"said": command["verb"]}

    async def talk() -> dict[str, Any] | None:
        async with server.served(deep, act, on_error=lambda _: None):
            assert stat.S_IMODE((deep / paths.CONTROL_SOCKET).stat().st_mode) == 0o600
            return await asyncio.to_thread(client.ask, deep, "hello")

    assert asyncio.run(talk()) == {"said": "hello"}
    assert not (deep / paths.CONTROL_SOCKET).exists()


def test_a_request_that_fails_in_the_job_gets_an_error_and_a_long_answer_is_complete(
    tmp_path: Path,
) -> None:
    heard: list[Exception] = []

    async def act(command: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"said": "x" * 300_000 if command["verb"] == "status" else int(float("inf"))}

    async def talk() -> dict[str, Any] | None:
        async with server.served(tmp_path, act, on_error=heard.append):
            with pytest.raises(ConfigError, match="OverflowError"):
                await asyncio.to_thread(client.ask, tmp_path, "set")
            return await asyncio.to_thread(client.ask, tmp_path, "status")

    values = asyncio.run(talk())
    assert values is not None
    assert len(values["said"]) == 300_000
    assert [type(error) for error in heard] == [OverflowError]


def test_a_client_that_has_asked_nothing_when_the_run_ends_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    errors: list[str] = []

    async def act(_: Mapping[str, Any]) -> Mapping[str, Any]:
        return {}

    async def job() -> socket.socket:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(str(context)))
        async with server.served(tmp_path / "store", act, lambda error: errors.append(str(error))):
            silent = socket.socket(socket.AF_UNIX)
            silent.settimeout(240)
            with protocol.socket_address(tmp_path / "store") as path:
                silent.connect(path)
            while len(asyncio.all_tasks()) < 2:  # it has been accepted, and its line is waited for
                await asyncio.sleep(0.001)
            return silent

    with asyncio.run(job()) as silent:
        assert silent.recv(1) == b""  # it was disconnected
    assert errors == []


def test_stop_waits_for_its_own_job_and_for_no_other(tmp_path: Path) -> None:
    asked_to_stop, next_one = StoreLock(tmp_path, started_at=1.0), StoreLock(tmp_path, started_at=2.0)

    async def act(command: Mapping[str, Any]) -> Mapping[str, Any]:
        asked_to_stop.__exit__(None, None, None)
        next_one.__enter__()  # as a service manager would, at once
        return {"said": "it drains"}

    async def live() -> None:
        asked_to_stop.__enter__()
        async with server.served(tmp_path, act, on_error=lambda _: None):
            waiting = asyncio.create_task(asyncio.to_thread(stop, tmp_path, wait=True, as_json=True))
            try:
                await asyncio.wait_for(asyncio.shield(waiting), 240)
            finally:
                assert is_held(tmp_path)
                next_one.__exit__(None, None, None)

    asyncio.run(live())


def test_where_no_socket_can_be_made_the_job_goes_on_without(tmp_path: Path) -> None:
    (tmp_path / paths.CONTROL_SOCKET).mkdir()
    heard: list[Exception] = []

    async def act(command: Mapping[str, Any]) -> Mapping[str, Any]:
        return command

    async def live() -> None:
        async with server.served(tmp_path, act, on_error=heard.append):
            pass

    asyncio.run(live())
    assert "can't be made" in str(heard[0])
    assert (tmp_path / paths.CONTROL_SOCKET).is_dir()


def test_a_run_that_has_nothing_to_send_keeps_the_budgets_of_status(
    mock_teacher: Mock, tmp_path: Path
) -> None:
    config = write_folder(tmp_path, mock_teacher().base_url, 3)
    with config.open("a", encoding="utf-8") as file:
        file.write("\n[budget]\ntokens = 5000\n[budget.store]\ntokens = 9000\n")
    seen = []
    for sent in (3, 0):
        done = harvester("run", config, "--json")
        assert (done.returncode, json.loads(done.stdout)["requests_sent"]) == (0, sent), done.stderr
        facts = json.loads(harvester("status", config, "--json").stdout)
        seen.append(facts["budgets"]["store"])
        assert (facts["budget"]["tokens"], facts["budgets"]["run"]["tokens"]) == (5000, 5000)
    assert seen[0] == seen[1]
    assert 0 < seen[0]["tokens_spent"] == 9000 - seen[0]["tokens_left"]
    assert facts["budgets"]["run"]["tokens_spent"] == 0

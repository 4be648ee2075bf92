"""Test the ledger as ground truth, and the server as a process: start, flags, signals, end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from harvester.errors import ConfigError, HarvesterError
from harvester.mock_teacher.running import start_in_thread, start_process
from harvester.mock_teacher.settings import MockSettings, parse_accuracy
from tests import commands
from tests.raw_client import Caller, body_of, once, raw
from tests.waiting import until


def test_the_ledger_charges_what_was_generated_and_nothing_else(mock_teacher, tmp_path):
    file = tmp_path / "billed.jsonl"
    mock = mock_teacher(
        ledger_file=file,
        faults=[
            {"action": "cut_body", "nth": 2},
            {"action": "status", "status": 500, "nth": 3},
            {"action": "reset", "nth": 4},
        ],
    )
    with Caller(mock.base_url) as caller:
        assert caller.ask("What is 1 + 2?", n=3).status == 200
        assert caller.ask("x", model="other").status == 404
    assert raw(mock.base_url).how == "fin"
    assert once(mock.base_url).status == 500
    assert raw(mock.base_url).how == "reset"
    assert once(mock.base_url).status == 200
    ledger = mock.ledger()
    assert [(charge["ordinal"], charge["cut"], charge["fault"]) for charge in ledger["entries"]] == [
        (1, False, None),
        (2, True, "1:cut_body"),
        (4, True, "3:reset"),
        (5, False, None),
    ]
    totals = ledger["totals"]
    assert (totals["requests"], totals["answers"], totals["cut"], totals["bodies"]) == (4, 6, 2, 2)
    assert totals["total_tokens"] == totals["prompt_tokens"] + totals["completion_tokens"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == ledger["entries"]
    assert mock.ledger(since=3)["entries"] == ledger["entries"][3:]


def test_a_caller_that_hangs_up_is_billed_all_the_same(mock_teacher):
    mock = mock_teacher(latency_s=0.4)
    assert raw(mock.base_url, patience_s=0.02).how == "silence"
    until(lambda: not mock.state()["in_flight"])
    assert [charge["cut"] for charge in mock.ledger()["entries"]] == [True]


def test_usage_and_ledger_agree(mock_teacher):
    mock = mock_teacher()
    usage = once(mock.base_url, n=4).json()["usage"]
    totals = mock.totals()
    assert {name: totals[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")
    }


def test_many_at_once_are_each_billed_once(mock_teacher):
    mock = mock_teacher(latency_s=0.02, latency_jitter=1.0)

    def ask_all(a: int) -> list[str]:
        with Caller(mock.base_url) as caller:
            return [caller.ask(f"What is {a} + {b}?").json()["id"] for b in range(10, 20)]

    with ThreadPoolExecutor(8) as pool:
        ids = [item for part in pool.map(ask_all, range(10, 18)) for item in part]
    assert len(set(ids)) == 80
    assert {charge["response_id"] for charge in mock.ledger()["entries"]} == set(ids)
    assert mock.totals()["bodies"] == 80
    assert 1 < mock.state()["most_in_flight"] <= 8


def test_a_request_in_absolute_form_is_served_as_by_a_proxy(mock_teacher):
    mock = mock_teacher()
    host = mock.base_url.split("/")[2]
    content = json.dumps(body_of("What is 1 + 2?")).encode()
    with socket.create_connection(tuple(host.split(":")), timeout=240) as line:
        target = b"http://teacher.test/v1/chat/completions"
        head = b"POST %s HTTP/1.1\r\nhost: teacher.test\r\ncontent-length: %d\r\n\r\n" % (
            target,
            len(content),
        )
        line.sendall(head + content)
        assert line.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_serves_and_ends_cleanly_on_a_signal(tmp_path, number):
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "harvester.mock_teacher", "--json", "--port-file", str(port_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        base_url = json.loads(process.stdout.readline())["base_url"]
        with Caller(base_url) as idle, Caller(base_url) as caller:
            assert idle.get("/models").status == 200
            assert caller.ask("What is 1 + 2?").status == 200
            process.send_signal(number)
            out, err = process.communicate(timeout=240)
    assert (process.returncode, out, err) == (0, b"", b"")
    assert base_url == f"http://127.0.0.1:{port_file.read_text()}/v1"


def test_flags_reach_the_server(tmp_path):
    script = tmp_path / "faults.toml"
    script.write_text('[[fault]]\naction = "status"\nstatus = 418\nnth = 2\n')
    ledger = tmp_path / "ledger.jsonl"
    flags = ["--model", "m", "--rpm", "600", "--burst", "10", "--tpm", "60000", "--accuracy", "sum=1"]
    with start_process(*flags, "--faults", str(script), "--ledger", str(ledger)) as mock:
        with Caller(mock.base_url) as caller:
            replies = [caller.send(body_of("What is 12 + 30?") | {"model": "m"}) for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 418]
        assert replies[0].text() == "42"
        assert replies[0].headers["x-ratelimit-limit-requests"] == "600"
        assert mock.fired() == {"1:status": 1}
        # A killed server leaves whole lines behind.
        os.kill(mock.pid, signal.SIGKILL)
    assert [json.loads(line)["ordinal"] for line in ledger.read_text().splitlines()] == [1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--accuracy", "often"], "accuracy"),
        (["--accuracy", "sum=1.5"], "sum=1.5"),
        (["--rpm", "0"], "rpm"),
        (["--faults", "missing.toml"], "missing.toml"),
        (["--require-key-env", "NO_SUCH_VARIABLE"], "NO_SUCH_VARIABLE"),
        (["--ledger", "/no/such/folder/ledger"], "/no/such/folder"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_2(flags, words):
    done = commands.run("harvester.mock_teacher", flags, timeout=240)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_named(mock_teacher):
    mock = mock_teacher()
    port = int(mock.base_url.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=str(port)):
        start_in_thread(MockSettings(port=port))
    with pytest.raises(HarvesterError, match=str(port)):
        start_process("--port", str(port))
    mock.stop()
    with start_in_thread(MockSettings(port=port)) as again:
        assert once(again.base_url).status == 200


def test_stopping_releases_callers_that_wait(mock_teacher):
    mock = mock_teacher(faults=[{"action": "silence"}])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(raw, mock.base_url, patience_s=60)
        until(lambda: mock.fired()["1:silence"])
        mock.stop()
        assert waiting.result(timeout=240).how in ("fin", "reset")
    mock.stop()


def test_accuracy_texts():
    assert parse_accuracy("0.9") == {"*": 0.9}
    assert parse_accuracy("sum=0.8, reverse=0.99") == {"*": 0.95, "sum": 0.8, "reverse": 0.99}
    assert parse_accuracy("0.5,sum=1") == {"*": 0.5, "sum": 1.0}
    for wrong in ("", "=1", "sum=", "sum=2", "x"):
        with pytest.raises(ConfigError):
            parse_accuracy(wrong)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_it_serves_tls(mock_teacher, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    openssl = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    subprocess.run([*openssl, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    mock = mock_teacher(certificate=certificate, private_key=key)
    assert mock.base_url.startswith("https://")
    assert mock.state()["received"] == 0


def test_a_mock_that_breaks_says_so(mock_teacher):
    mock = mock_teacher()
    mock.set_faults([{"action": "headers", "value": {"bad header": "x"}}])
    assert raw(mock.base_url).how == "fin"
    assert "LocalProtocolError" in mock.state()["errors"][0]
    mock.stop()

"""The check before the first request: not while on hold, repeated while the teacher can't be reached."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harvester.api import model_list
from harvester.config.overrides import Overrides
from harvester.mock_teacher.running import RunningMock
from harvester.run import job
from harvester.run.control import client
from harvester.run.prepare import prepare
from tests.faults.bench import Hasty
from tests.journey.run_process import write_folder
from tests.ports import refusing_port

Mock = Callable[..., RunningMock]
Status = Mapping[str, Any]
PATIENT = "[run]\npatience_s = 30\n"


@pytest.fixture
def port() -> Iterator[int]:
    with refusing_port() as number:
        yield number


def test_a_teacher_that_starts_late_is_waited_for_and_status_says_so(
    mock_teacher: Mock, tmp_path: Path, port: int
) -> None:
    config = write_folder(tmp_path, f"http://127.0.0.1:{port}/v1", 3, more=PATIENT)
    started: list[RunningMock] = []

    def watch(status: Status) -> None:
        if status["waiting"].startswith(f"nobody answers at 127.0.0.1:{port}") and not started:
            started.append(mock_teacher(port=port))

    ended = asyncio.run(job.run(prepare(config), watch, Hasty(100)))
    assert (ended.exit_code, ended.counts.answers_stored) == (0, 3)
    assert started[0].totals()["answers"] == 3


def test_no_teacher_within_patience_parks_before_any_send(tmp_path: Path, port: int) -> None:
    config = write_folder(tmp_path, f"http://127.0.0.1:{port}/v1", 3, more=PATIENT)
    ended = asyncio.run(job.run(prepare(config), lambda _: None, Hasty(100)))
    assert (ended.ending, ended.exit_code, ended.counts.requests_sent) == ("parked", 10, 0)
    assert f"nobody answers at 127.0.0.1:{port}/v1/models: can't connect: connection refused" in ended.detail
    assert "is base_url right?" in ended.detail


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "'SSH-2.0-OpenSSH_9.6' was received"),
        (b"-ERR unknown command 'GET'\r\n", "unknown command"),
        (b"\x15\x03\x03\x00\x02\x02\x46", "https://"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: abc\r\n\r\n{}", "content-length: abc"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello", "decode"),
        (b"", "closed before a reply"),
    ],
)
def test_an_address_where_no_api_answers_is_named_with_what_it_sent(
    tmp_path: Path, reply: bytes, expected: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answered = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65_536)
                    connection.sendall(reply)
                    answered.append(reply)

        threading.Thread(target=answer, daemon=True).start()
        config = write_folder(tmp_path, f"http://127.0.0.1:{port}/v1", 3, more="[run]\npatience_s = 1\n")
        ended = asyncio.run(job.run(prepare(config), lambda _: None, Hasty(100)))
        server.shutdown(socket.SHUT_RDWR)
    assert (ended.ending, ended.exit_code, ended.counts.requests_sent) == ("parked", 10, 0)
    assert answered
    assert f"127.0.0.1:{port}/v1/models can be reached" in ended.detail
    assert expected in ended.detail
    assert not any(word in ended.detail for word in ("nobody answers", "Expected HTTP", "message=", "b'"))


def test_one_of_two_endpoints_is_enough(mock_teacher: Mock, tmp_path: Path, port: int) -> None:
    other = f'replicas = ["{mock_teacher().base_url}"]\n'
    config = write_folder(tmp_path, f"http://127.0.0.1:{port}/v1", 3, teacher=other)
    ended = asyncio.run(job.run(prepare(config), lambda _: None, Hasty()))
    assert (ended.exit_code, ended.counts.answers_stored) == (0, 3)


def test_a_stop_does_not_wait_for_the_check(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts the connection and never answers
        config = write_folder(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/v1", 3)

        async def go() -> job.Summary:
            asked = asyncio.create_task(job.run(prepare(config), lambda _: None))
            line, _ = await asyncio.to_thread(silent.accept)
            with line:
                await asyncio.to_thread(line.recv, 1000)
                await asyncio.to_thread(client.tell, tmp_path / "store", "stop")
                return await asked

        ended = asyncio.run(go())
    assert (ended.ending, ended.exit_code, ended.counts.requests_sent) == ("stopped", 10, 0)


class Turned(Hasty):
    """A fast clock whose wall time can be moved ahead."""

    ahead_s = 0.0

    def wall(self) -> float:
        """Unix seconds, moved ahead."""
        return time.time() + self.ahead_s


def test_nothing_is_sent_outside_opening_hours(mock_teacher: Mock, tmp_path: Path) -> None:
    mock = mock_teacher(faults=[{"name": "look", "action": "status", "status": 404, "on": "models"}])
    opens, closes = (datetime.now(UTC) + timedelta(hours=more) for more in (6, 7))
    hours = f'[schedule]\nhours = ["{opens:%H:%M}-{closes:%H:%M} UTC"]\n'
    config = write_folder(tmp_path, mock.base_url, 4, more=hours)
    clock, looks = Turned(250), []

    def watch(status: Status) -> None:
        if status["state"] == "on hold":
            looks.append(mock.fired()["look"])
            clock.ahead_s = 6.5 * 3600 if len(looks) > 3 else 0.0

    ended = asyncio.run(job.run(prepare(config, Overrides(watch=True, rows=3)), watch, clock))
    assert looks[:4] == [0, 0, 0, 0]
    assert (ended.ending, ended.counts.answers_stored, mock.fired()) == ("rows", 3, {"look": 1})


@pytest.mark.parametrize(
    ("listed", "wanted", "is_listed"),
    [
        ("llama3:latest", "llama3", True),
        ("llama3:70b", "llama3:8b", False),
        ("llama3:8b", "llama3", False),
        ("openai/gpt-oss-120b", "openai/gpt-oss-120b:nitro", True),
        ("openai/*", "openai/gpt-oss-20b", True),
        ("mistral/*", "openai/gpt-oss-20b", False),
        ("GPT-OSS-20B", "gpt-oss-20b", True),
        ("models/gemini", "gemini", True),
        ("gemini-pro", "gemini", False),
    ],
)
def test_a_model_may_be_listed_by_another_spelling(listed: str, wanted: str, is_listed: bool) -> None:
    assert model_list.contains(["other", listed], wanted) is is_listed


def test_one_page_of_a_list_says_nothing_about_the_others() -> None:
    page = {"data": [{"id": "a"}], "has_more": True}
    assert model_list.parse(json.dumps(page).encode()) == []
    assert model_list.parse(json.dumps({**page, "has_more": False}).encode()) == ["a"]

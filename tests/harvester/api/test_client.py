"""The HTTP client: what is sent, what comes back, and how errors are translated."""

from __future__ import annotations

import asyncio
import gzip
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import httpx
import orjson
import pytest
import respx

from harvester.api import model_list
from harvester.api.http import client, reply_reader
from harvester.api.http.client import USER_AGENT, Client
from harvester.api.http.reply_reader import MAX_BODY_BYTES
from harvester.api.replies.completion import parse
from harvester.api.request_builder import requests
from harvester.api.types import Prompt, RawAnswer
from harvester.config.config import HarvestConfig
from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    PromptRejected,
    RateLimited,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.mock_teacher.running import RunningMock
from tests.ports import refusing_port

URL = "http://127.0.0.1:9/v1"
GOOD = orjson.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]})
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def config(url: str = URL, **run: Any) -> HarvestConfig:
    teacher = {"base_url": url, "model": "m"}
    return HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": ["p"]}, "run": run})


def send(
    chosen: HarvestConfig, *, key: str | None = None, router: respx.MockRouter | None = None
) -> RawAnswer:
    async def go() -> RawAnswer:
        transport = None if router is None else httpx.MockTransport(router.async_handler)
        async with Client(chosen.teacher, chosen.run, key, transport=transport) as client:
            request = next(requests([Prompt("p", ({"role": "user", "content": "2+2"},))], chosen))
            return await client.send(request, chosen.teacher.base_url)

    return asyncio.run(go())


def models(router: respx.MockRouter) -> list[str]:
    async def go() -> list[str]:
        chosen = config()
        transport = httpx.MockTransport(router.async_handler)
        async with Client(chosen.teacher, chosen.run, None, transport=transport) as client:
            return await client.models(URL)

    return asyncio.run(go())


@contextmanager
def wire(reply: bytes, *, hang: bool = False, reset: bool = False) -> Iterator[str]:
    """A socket that reads one request and answers with exactly these bytes."""
    import threading

    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        try:
            line, _ = listener.accept()
        except OSError:
            return
        with line:
            received = b""
            while b"\r\n\r\n" not in received or not received.endswith(b"}"):
                received += line.recv(65536)
            line.sendall(reply)
            if hang:
                over.wait(240)
            if reset:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        over.set()
        listener.close()
        thread.join(240)


def http_reply(
    body: bytes,
    headers: Mapping[str, str] | None = None,
    length: int | None = None,
    status: str = "200 OK",
) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_the_request_that_is_sent() -> None:
    with respx.mock(assert_all_mocked=True) as router:
        route = router.post(f"{URL}/chat/completions").respond(200, content=GOOD)
        answer = send(config(), key="sk-secret", router=router)
    sent = route.calls.last.request
    assert answer.body == GOOD
    assert sent.headers["authorization"] == "Bearer sk-secret"
    assert sent.headers["user-agent"] == USER_AGENT
    assert orjson.loads(sent.content) == {"model": "m", "messages": [{"role": "user", "content": "2+2"}]}


def test_without_a_key_no_authorization_is_sent() -> None:
    with respx.mock() as router:
        route = router.post(f"{URL}/chat/completions").respond(200, content=GOOD)
        send(config(), router=router)
    assert "authorization" not in route.calls.last.request.headers


def test_a_redirect_is_never_followed() -> None:
    with respx.mock(assert_all_called=False) as router:
        router.post(f"{URL}/chat/completions").respond(307, headers={"location": "http://evil.example/x"})
        elsewhere = router.route(host="evil.example").respond(200, content=GOOD)
        with pytest.raises(TeacherRefused, match=r"evil\.example"):
            send(config(), key="sk-secret", router=router)
    assert not elsewhere.called


def test_a_refusal_echoing_the_key_does_not_show_it() -> None:
    with respx.mock() as router:
        message = {"error": {"message": "Incorrect API key provided: odd_secret_value"}}
        router.post(f"{URL}/chat/completions").respond(401, json=message)
        with pytest.raises(TeacherRefused) as caught:
            send(config(), key="odd_secret_value", router=router)
    assert "odd_secret_value" not in str(caught.value)


def test_retry_after_arrives_in_the_error() -> None:
    with respx.mock() as router:
        router.post(f"{URL}/chat/completions").respond(429, headers={"Retry-After-Ms": "1500"})
        with pytest.raises(RateLimited) as caught:
            send(config(), router=router)
    assert caught.value.retry_after_s == 1.5


@pytest.mark.parametrize("has_date", [True, False])
def test_a_date_in_retry_after_counts_from_the_replys_own_time_or_from_ours(has_date: bool) -> None:
    """The server's clock is an hour off; without a Date header only ours is left."""
    server_now = time.time() + (3600 if has_date else 0)
    headers = {"retry-after": formatdate(server_now + 40, usegmt=True)}
    if has_date:
        headers["date"] = formatdate(server_now, usegmt=True)
    with respx.mock(assert_all_called=False) as router:
        router.post(f"{URL}/chat/completions").respond(429, headers=headers, json={"error": {"message": "m"}})
        with pytest.raises(RateLimited) as caught:
            send(config(), router=router)
    assert caught.value.retry_after_s is not None
    assert 30 <= caught.value.retry_after_s <= 41


def test_a_refused_connection_was_not_billed() -> None:
    with refusing_port() as port, pytest.raises(TeacherUnavailable) as caught:
        send(config(f"http://127.0.0.1:{port}/v1"))
    assert not caught.value.maybe_billed
    assert f"127.0.0.1:{port}" in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"HTTP/1.1 200",
        b"SMTP ready\r\n\r\n",
        http_reply(GOOD[:-10], length=len(GOOD)),
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 100_000 + b"\r\n\r\n",
    ],
    ids=["closed", "half a head", "not http", "short body", "cut chunk", "endless header"],
)
def test_broken_connections_may_have_been_billed(reply: bytes) -> None:
    with wire(reply) as url, pytest.raises(ConnectionBroken) as caught:
        send(config(url))
    assert caught.value.maybe_billed
    assert not caught.value.is_permanent


def test_a_reset_may_have_been_billed() -> None:
    with (
        wire(http_reply(GOOD[:-1], length=999), reset=True) as url,
        pytest.raises(ConnectionBroken) as caught,
    ):
        send(config(url))
    assert caught.value.maybe_billed


@pytest.mark.parametrize("reply", [b"", http_reply(GOOD[:-1], length=999)], ids=["silence", "stalled body"])
def test_one_deadline_covers_connect_to_last_byte(reply: bytes) -> None:
    with wire(reply, hang=True) as url, pytest.raises(AttemptTimeout) as caught:
        send(config(url, deadline_s=0.2))
    assert caught.value.maybe_billed


def chunked(*chunks: bytes, status: int = 200, more: str = "") -> bytes:
    """A reply in chunks without the last, empty one."""
    head = f"HTTP/1.1 {status} X\r\ntransfer-encoding: chunked\r\n{more}\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


PIECES = b'data: {"choices":[{"delta":{"content":"4"},"finish_reason":"stop"}]}\n\n'


@pytest.mark.parametrize(
    "reply",
    [
        chunked(GOOD),
        chunked(GOOD[:20], GOOD[20:]),
        http_reply(GOOD, length=len(GOOD) + 10),
        chunked(PIECES + b"data: [DONE]\n\n"),
        chunked(PIECES),
        chunked(gzip.compress(GOOD), more="content-encoding: gzip\r\n"),
    ],
    ids=["no last chunk", "in two", "length too large", "stream", "stream without an end mark", "gzip"],
)
@pytest.mark.parametrize("end", ["closed", "reset", "open"])
def test_a_complete_body_whose_framing_has_no_end_is_an_answer(
    reply: bytes, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FRAMING_PATIENCE_S", 0.1)
    with wire(reply, hang=end == "open", reset=end == "reset") as url:
        answer = send(config(url, deadline_s=5))
    assert parse(answer.body).text == "4"


def test_an_error_status_needs_no_complete_body() -> None:
    with wire(chunked(b'{"error": {"message": "slow do', status=429)) as url, pytest.raises(RateLimited):
        send(config(url))


def test_a_header_of_nine_kilobytes_is_read() -> None:
    for size in (8_200, 9_000, 60_000):
        with wire(http_reply(GOOD, {"x-long": "a" * size})) as url:
            assert send(config(url)).body == GOOD


def test_a_compressed_answer_is_decoded_and_a_bomb_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = http_reply(gzip.compress(GOOD), {"content-encoding": "gzip"})
    with wire(packed) as url:
        assert send(config(url)).body == GOOD
    monkeypatch.setattr(reply_reader, "MAX_BODY_BYTES", 1 << 20)
    bomb = http_reply(gzip.compress(b"0" * (8 << 20)), {"content-encoding": "gzip"})
    with wire(bomb) as url, pytest.raises(PromptRejected, match="larger than 1 MiB"):
        send(config(url))


def test_a_wrong_content_encoding_loses_no_answer() -> None:
    for body, encoding in ((GOOD, "gzip"), (GOOD, "utf-8"), (gzip.compress(GOOD), "identity")):
        with wire(http_reply(body, {"content-encoding": encoding})) as url:
            assert send(config(url)).body == GOOD
    with wire(http_reply(b"\x0b\x02\x80", {"content-encoding": "br"})) as url, pytest.raises(TeacherError):
        send(config(url))


@pytest.mark.parametrize("status", ["201 Created", "202 Accepted", "203 Non-Authoritative", "206 Partial"])
def test_an_answer_under_another_success_is_one(status: str) -> None:
    with wire(http_reply(GOOD, status=status)) as url:
        assert send(config(url)).body == GOOD
    with (
        wire(http_reply(b'{"status": "pending"}', status=status)) as url,
        pytest.raises(BrokenAnswer, match=f"{status[:3]} where 200 was expected"),
    ):
        send(config(url))


@pytest.mark.parametrize(
    ("status", "content", "listed"),
    [
        (200, {"data": [{"id": "m"}, {"id": "n"}]}, ["m", "n"]),
        (200, {}, []),
        (404, {}, []),
        (503, {}, []),
        (403, {"error": "this key may not list models"}, []),
        (401, {"error": {"message": "Missing scopes: api.model.read"}}, []),
        (405, {}, []),
    ],
)
def test_models_are_listed_where_there_is_a_list(status: int, content: Any, listed: list[str]) -> None:
    with respx.mock() as router:
        router.get(f"{URL}/models").respond(status, json=content)
        assert models(router) == listed
    assert all(model_list.contains([name, f"models/{name}"], name) for name in listed)
    assert not model_list.contains(listed, "o")


def test_an_endless_list_of_models_is_refused_as_such() -> None:
    with respx.mock() as router:
        router.get(f"{URL}/models").respond(200, content=b" " * (MAX_BODY_BYTES + 1))
        with pytest.raises(TeacherRefused, match=r"the list of models can't be read: .* larger than 32 MiB"):
            models(router)


@pytest.mark.parametrize(("status", "message"), [(401, "key"), (307, "redirects to evil.example")])
def test_a_wrong_key_or_a_redirect_is_found_at_the_model_list(status: int, message: str) -> None:
    with respx.mock() as router:
        router.get(f"{URL}/models").respond(status, headers={"location": "http://evil.example/x"})
        with pytest.raises(TeacherRefused, match=message):
            models(router)


def test_an_unreachable_endpoint_is_transient_and_has_no_status() -> None:
    with respx.mock() as router:
        router.get(f"{URL}/models").mock(side_effect=httpx.ConnectError("refused"))
        with pytest.raises(TeacherUnavailable) as met:
            models(router)
    assert (met.value.status, met.value.maybe_billed) == (None, False)


def test_cancelled_requests_leave_no_connection_slot_taken(mock_teacher: Callable[..., RunningMock]) -> None:
    # httpx's own pool loses a slot for each that is cancelled while it waits for one (encode/httpcore#1093).
    mock = mock_teacher(model="m", faults=[{"action": "delay", "delay_s": 600}])
    chosen = config(mock.base_url)

    async def go() -> tuple[int, list[int]]:
        cut = 0
        async with Client(chosen.teacher, chosen.run, None) as client:

            async def ask(number: int) -> int:
                prompt = Prompt(f"p{number}", ({"role": "user", "content": f"What is {number} + 1?"},))
                return (await client.send(next(requests([prompt], chosen)), chosen.teacher.base_url)).status

            for wave in range(4):
                tasks = [asyncio.create_task(ask(number)) for number in range(250)]
                await asyncio.sleep(0.02 * wave)  # before they connect, while they do, once they are sent
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                cut += sum(isinstance(end, asyncio.CancelledError) for end in ends)
            mock.set_faults([])
            return cut, await asyncio.gather(*(ask(number) for number in range(64)))

    cut, healthy = asyncio.run(go())
    assert cut == 1000
    assert healthy == [200] * 64


@pytest.mark.parametrize("size", [10, 3 * client.PIECE_BYTES])
def test_a_body_has_a_content_length_also_when_sent_in_pieces(size: int) -> None:
    heads: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).lower())
        length = int(heads[-1].split(b"content-length: ")[1].split(b"\r\n")[0])
        assert len(orjson.loads(await reader.readexactly(length))["messages"][0]["content"]) == size
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(GOOD), GOOD))
        writer.close()

    async def go() -> int:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            chosen = config(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", deadline_s=60)
            async with Client(chosen.teacher, chosen.run, None) as client:
                request = next(requests([Prompt("p", ({"role": "user", "content": "x" * size},))], chosen))
                return (await client.send(request, chosen.teacher.base_url)).status

    assert asyncio.run(go()) == 200
    assert len(heads) == 1
    assert b"transfer-encoding" not in heads[0]  # some servers refuse chunked requests with 411

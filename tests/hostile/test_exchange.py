"""Test that whatever one exchange brings concerns its row only: the pass and its other rows go on."""

from __future__ import annotations

import asyncio
import binascii
import builtins
import json
import ssl
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from httpx_aiohttp import AiohttpTransport

from harvester.api import parse_in_child
from tests.hostile.runs import harvest
from tests.hostile.server import hostile_teacher, http
from tests.tiers import rest_is_slow

# They end the run in words, by design: a certificate that is not trusted, or no memory.
_END_THE_RUN = (aiohttp.ClientConnectorSSLError, aiohttp.ClientConnectorCertificateError, MemoryError)
_POINTS = ("send", "read", "close", "redact", "parse")


def exception_classes() -> Iterator[type[BaseException]]:
    """Every exception class of the standard library's builtins, of the HTTP libraries and of decoders."""
    seen: set[type[BaseException]] = {asyncio.CancelledError}
    for module in (builtins, httpx, aiohttp, asyncio, ssl, zlib, binascii, json):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Exception):
                seen.add(value)
    # A coroutine turns the first two into a RuntimeError; one warning stands for all.
    seen -= {
        StopIteration,
        StopAsyncIteration,
        *Warning.__subclasses__(),
        aiohttp.BadContentDispositionHeader,
    }
    yield from sorted((kind for kind in seen if not issubclass(kind, _END_THE_RUN)), key=name_of)


def name_of(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def made(kind: type[BaseException]) -> BaseException:
    """An instance without its arguments: even its text may raise."""
    if issubclass(kind, BaseExceptionGroup):
        return kind("group", [ValueError("inner")])
    return kind.__new__(kind)


class Thrower:
    """Raises in the exchange of a prompt such as `read:KeyError:12`, in its first attempt."""

    def __init__(self, classes: dict[str, type[BaseException]]) -> None:
        self._classes = classes
        self.raised: set[str] = set()

    def throw(self, point: str, text: str) -> None:
        start = text.find(f"{point}:")
        if start < 0:
            return
        prompt = text[start:].split("!")[0]
        if prompt not in self.raised:
            self.raised.add(prompt)
            raise made(self._classes[prompt.split(":")[1]])


@pytest.fixture
def thrower(monkeypatch: pytest.MonkeyPatch) -> Thrower:
    thrower = Thrower({name_of(kind): kind for kind in exception_classes()})
    send, redact, parse = AiohttpTransport.handle_async_request, parse_in_child.redact, parse_in_child.parse

    async def handle(self: Any, request: httpx.Request) -> httpx.Response:
        text = request.content.decode() if request.method == "POST" else "models:ValueError:1!"
        thrower.throw("send", text)
        response = await send(self, request)
        stream = response.stream

        class Stream(httpx.AsyncByteStream):
            async def __aiter__(self) -> Any:
                thrower.throw("read", text)
                async for chunk in stream:  # type: ignore[union-attr]
                    yield chunk

            async def aclose(self) -> None:
                await stream.aclose()  # type: ignore[union-attr]
                thrower.throw("close", text)

        response.stream = Stream()
        return response

    async def redacting(redactor: Any, body: bytes) -> bytes:
        thrower.throw("redact", body.decode())
        return await redact(redactor, body)

    async def parsing(raw: bytes, *args: Any) -> Any:
        thrower.throw("parse", raw.decode())
        return await parse(raw, *args)

    monkeypatch.setattr(AiohttpTransport, "handle_async_request", handle)
    monkeypatch.setattr(parse_in_child, "redact", redacting)
    monkeypatch.setattr(parse_in_child, "parse", parsing)
    return thrower


@pytest.mark.slow
def test_every_exception_at_every_await_is_the_fault_of_one_row(thrower: Thrower, tmp_path: Path) -> None:
    poisoned = [f"{point}:{name_of(kind)}:1!" for point in _POINTS for kind in exception_classes()]
    prompts = [prompt for poison in poisoned for prompt in (poison, f"good after {poison.replace(':', ' ')}")]
    with hostile_teacher() as teacher:
        ended = harvest(tmp_path, teacher.base_url, prompts)
    assert len(thrower.raised) == len(poisoned) > 300
    assert ended.exit_code == 3, ended.output
    assert {prompt for prompt in prompts if prompt not in poisoned} <= set(ended.answered)
    # A connection that failed is made again; every other fault is a dead letter with a name.
    assert set(ended.answered) | set(ended.dead) == set(prompts)
    assert set(ended.dead.values()) <= {"connection", "broken_answer", "timeout", "unavailable"}


@pytest.mark.parametrize(
    "location", ["http://[evil", "http://[::1", "//[", "\x00http://\\", "h" * 60_000], ids=range(5)
)
def test_a_redirect_to_no_url_ends_the_run_in_words(location: str, tmp_path: Path) -> None:
    reply = http(b"", {"location": location.replace("\x00", "")}, "302 Found")
    with hostile_teacher({"evil": reply}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["good", "evil"])
        assert ended.exit_code == 4
        assert "redirects" in ended.output
        teacher.replies.clear()
        again = harvest(tmp_path, teacher.base_url, ["good", "evil"])
    assert again.exit_code == 0
    assert set(again.answered) == {"good", "evil"}
    assert sorted(teacher.asked).count("good") == 1  # no answer is paid for again


@pytest.mark.parametrize(
    "headers",
    rest_is_slow(
        [
            {"retry-after": "Mon, 01 Jan 2024 00:00:00 +9999999999999999"},
            {"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"},
            {"retry-after": "9" * 60_000},
            {"retry-after": "1e999", "retry-after-ms": "-1e999"},
            {"x-ratelimit-reset-tokens": "9" * 60_000 + "x", "x-ratelimit-limit-tokens": "9" * 60_000},
            {f"x-ratelimit-reset-tokens-{number}": "9" * 8_000 + "x" for number in range(50)},
            {"ratelimit-policy": ";w=" + "9" * 60_000, "ratelimit-limit": "1" * 400},
        ],
        first=2,
    ),
    ids=range(7),
)
@pytest.mark.parametrize(
    "status", ["429 Too Many Requests", pytest.param("503 Service Unavailable", marks=pytest.mark.slow)]
)
def test_headers_out_of_every_range_cost_only_their_row(
    headers: dict[str, str], status: str, tmp_path: Path
) -> None:
    refused = http(b"{}", {"date": "Mon, 01 Jan 2024 00:00:00 GMT", **headers}, status)
    with hostile_teacher({"evil": refused}) as teacher:
        prompts = [f"good {number}" for number in range(30)]
        ended = harvest(tmp_path, teacher.base_url, [*prompts, "evil", "last"])
        # 10: it is asked to wait longer than its patience, and the next run still is.
        assert ended.exit_code in {0, 3, 10}, ended.output
        assert set(ended.dead) <= {"evil"}
        teacher.replies.clear()
        again = harvest(tmp_path, teacher.base_url, [*prompts, "evil", "last"])
    assert again.exit_code in {0, 3, 10}
    assert set(prompts) <= set(again.answered)
    assert all(teacher.asked.count(prompt) == 1 for prompt in prompts)  # none is paid for again


def test_an_exception_out_of_the_list_of_models_is_no_end_of_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    send = AiohttpTransport.handle_async_request
    failures: list[type[BaseException]] = [asyncio.CancelledError, KeyError, aiohttp.ClientConnectorDNSError]

    async def handle(self: Any, request: httpx.Request) -> httpx.Response:
        if request.method == "GET" and failures:
            raise made(failures.pop())
        return await send(self, request)

    monkeypatch.setattr(AiohttpTransport, "handle_async_request", handle)
    with hostile_teacher() as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["good"], run={"patience_s": 50_000})
    assert not failures
    assert (ended.exit_code, set(ended.answered)) == (0, {"good"})

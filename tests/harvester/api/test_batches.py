"""The Batch API through the openai SDK, against the mock teacher's real files and batches."""

from __future__ import annotations

import asyncio
import hashlib
import re

import orjson
import pytest

from harvester.api.batches import BatchClient, BatchResult, Ticket, batch_lines, read_results
from harvester.api.types import Prompt, Request
from harvester.config.config import TeacherSection
from harvester.errors import BrokenAnswer, TeacherRefused, TeacherUnavailable


def request(text: str, model: str = "mock-teacher") -> Request:
    messages = ({"role": "user", "content": text},)
    body = {"model": model, "messages": list(messages), "temperature": 0.0}
    return Request(hashlib.sha256(orjson.dumps(body)).digest(), Prompt(text, messages), body)


async def journey(
    teacher: TeacherSection, requests: list[Request]
) -> tuple[Ticket, list[Ticket], list[BatchResult]]:
    async with BatchClient(teacher, None) as batches:
        submitted = await batches.submit(requests, run_id="run-7")
        ticket = await batches.poll(submitted.batch_id)
        actual = await batches.find("run-7")
        results = [result async for result in batches.collect(ticket, received_at=1.0)]
        assert await batches.find("another-run") == []
    return ticket, actual, results


def test_a_batch_is_answered_billed_once_and_found_again_by_its_run(mock_teacher):
    mock = mock_teacher(accuracy=1.0)
    requests = [request(f"What is {n} + 30?") for n in range(10, 60)]
    ticket, actual, results = asyncio.run(
        journey(
            TeacherSection(base_url=mock.base_url, model="mock-teacher"),
            [*requests, request("x", model="other")],
        )
    )
    assert ticket.is_finished
    assert (ticket.completed, ticket.failed, ticket.total) == (50, 1, 51)
    assert [t.batch_id for t in actual] == [ticket.batch_id]
    by_key = {result.key: result for result in results}
    assert set(by_key) >= {r.key for r in requests}
    for number, entry in enumerate(requests, start=10):
        answer = by_key[entry.key].answer
        assert answer is not None
        assert orjson.loads(answer.body)["choices"][0]["message"]["content"] == str(number + 30)
    assert [r.error_code for r in results if r.answer is None] == ["model_not_found"]
    assert mock.totals()["answers"] == 50


def test_an_unreachable_or_refusing_provider_is_translated_without_the_key():
    async def submit(url: str) -> None:
        async with BatchClient(TeacherSection(base_url=url, model="m"), "canary-key") as batches:
            await batches.submit([request("x")], run_id="r")

    with pytest.raises(TeacherUnavailable) as caught:
        asyncio.run(submit("http://127.0.0.1:9/v1"))
    assert "canary-key" not in repr(caught.value.__dict__)


def test_a_refused_upload_stops(mock_teacher, monkeypatch: pytest.MonkeyPatch):
    mock = mock_teacher()

    async def poll() -> None:
        async with BatchClient(TeacherSection(base_url=mock.base_url, model="mock-teacher"), None) as batches:
            await batches.poll("batch_unknown")

    with pytest.raises(TeacherRefused, match="404"):
        asyncio.run(poll())


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"custom_id": "zz"}', b'{"response": {}}'])
def test_a_broken_result_line_is_named_and_its_bytes_kept(line: bytes):
    with pytest.raises(BrokenAnswer, match="line 1") as caught:
        list(read_results(line, endpoint="e", received_at=0.0))
    assert caught.value.raw == line


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="1 to"):
        batch_lines([])


def test_a_redirect_is_not_followed_and_nothing_is_asked_twice():
    """The key would go along to wherever the Location points."""
    sent: list[bytes] = []

    async def submit() -> None:
        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            sent.append(head.partition(b"\r\n")[0])
            length = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            place = f"http://127.0.0.1:{port}/elsewhere".encode()
            writer.write(b"HTTP/1.1 307 See There\r\nLocation: " + place + b"\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(reply, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            teacher = TeacherSection(base_url=f"http://127.0.0.1:{port}/v1", model="m")
            async with BatchClient(teacher, "canary-key") as batches:
                await batches.submit([request("x")], run_id="r")

    with pytest.raises(TeacherRefused, match="answered 307"):
        asyncio.run(submit())
    assert sent == [b"POST /v1/files HTTP/1.1"]

"""The Batch API through the openai SDK, against the mock teacher's real files and batches."""

from __future__ import annotations

import asyncio
import hashlib
import re

import orjson
import pytest

from harvester.api.batches import BatchClient, ProviderBatch, ResultLine, batch_line, body_of, read_line
from harvester.api.replies.completion import parse
from harvester.api.types import Prompt, Request
from harvester.config.teacher_section import TeacherSection
from harvester.errors import BrokenAnswer, PromptRejected, RateLimited, TeacherRefused, TeacherUnavailable


def request(text: str, model: str = "mock-teacher") -> Request:
    messages = ({"role": "user", "content": text},)
    body = {"model": model, "messages": list(messages), "temperature": 0.0, "stream": True}
    return Request(hashlib.sha256(orjson.dumps(body)).digest(), Prompt(text, messages), body)


def content_of(requests: list[Request]) -> bytes:
    return b"".join(batch_line(each.key, body_of(each), "/v1/chat/completions") for each in requests)


async def journey(
    teacher: TeacherSection, requests: list[Request]
) -> tuple[ProviderBatch, dict[str, ProviderBatch], list[ResultLine]]:
    async with BatchClient(teacher, None) as client:
        file_id = await client.upload("batch-7", content_of(requests))
        created = await client.create(file_id, "batch-7")
        ticket = await client.poll(created.batch_id)
        listed = await client.find({"batch-7": "", "another": ""}, since=0.0)
        assert await client.find({"renamed": file_id}, since=0.0) == {}  # its name counts first
        lines = [
            read_line(line)
            for file in (ticket.output_file_id, ticket.error_file_id)
            if file is not None
            async for line in client.lines(file)
        ]
    return ticket, listed, lines


def test_a_batch_is_answered_billed_once_and_found_again_by_its_name(mock_teacher):
    mock = mock_teacher(accuracy=1.0)
    requests = [request(f"What is {n} + 30?") for n in range(10, 60)]
    teacher = TeacherSection(base_url=mock.base_url, model="mock-teacher")
    ticket, listed, lines = asyncio.run(journey(teacher, [*requests, request("x", model="other")]))
    assert ticket.is_finished
    assert (ticket.completed, ticket.failed, ticket.total) == (50, 1, 51)
    assert [(name, each.batch_id) for name, each in listed.items()] == [("batch-7", ticket.batch_id)]
    by_key = {line.key: line for line in lines}
    for number, entry in enumerate(requests, start=10):
        assert orjson.loads(by_key[entry.key].body)["choices"][0]["message"]["content"] == str(number + 30)
    errors = [line.failure("place") for line in lines if line.status != 200]
    assert [(type(error), error.error_code) for error in errors] == [(TeacherRefused, "model_not_found")]
    assert mock.totals()["answers"] == 50


def test_the_body_is_kept_byte_for_byte():
    """Escapes, large numbers and the order of members stay as the provider wrote them."""
    body = rb'{ "a": "\u00e9 } , \"", "n":12345678901234567890123, "z": [1, {"body": {}}], "b":1.10 }'
    line = rb'{"id": "x", "custom_id": "00ff", "error": null, "response": {"x": {"body": 1}, "body": ' + body
    assert read_line(line + rb', "status_code": 200}}').body == body


@pytest.mark.parametrize(
    ("line", "error", "code"),
    [
        ({"error": {"code": "batch_expired", "message": "late"}}, TeacherUnavailable, "batch_expired"),
        ({"response": {"status_code": 429, "body": {"error": {"message": "slow"}}}}, RateLimited, ""),
        ({"response": {"status_code": 500, "body": {}}}, TeacherUnavailable, ""),
        (
            {"response": {"status_code": 400, "body": {"error": {"message": "no", "code": "bad"}}}},
            PromptRejected,
            "bad",
        ),
        ({"response": None}, BrokenAnswer, ""),
    ],
)
def test_lines_without_an_answer_are_judged_like_single_replies(line, error, code):
    failure = read_line(orjson.dumps({"custom_id": "00", **line})).failure("place")
    assert (type(failure), failure.error_code, failure.maybe_billed) == (error, code, False)


ANSWERED = {"id": "r", "choices": [{"index": 0, "message": {"content": "4"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize(
    "response",
    [
        {"status_code": 200, "body": ANSWERED},
        {"status_code": "200", "body": ANSWERED},
        {"status_code": 201, "body": ANSWERED},
        {"body": ANSWERED},
        ANSWERED,
        {"status_code": 200, "body": orjson.dumps(ANSWERED).decode()},
    ],
    ids=range(6),
)
def test_an_answer_in_the_line_of_any_provider_is_one(response):
    line = read_line(orjson.dumps({"custom_id": "00", "response": response, "error": None}))
    assert (line.status, parse(line.body).text) == (200, "4")
    assert read_line(orjson.dumps({"custom_id": "00", "response": {"body": {"id": "r"}}})).status is None


def test_an_unreachable_or_refusing_provider_is_translated_without_the_key():
    async def upload(url: str) -> None:
        async with BatchClient(TeacherSection(base_url=url, model="m"), "canary-key-of-16") as client:
            await client.upload("n", b"{}")

    with pytest.raises(TeacherUnavailable) as caught:
        asyncio.run(upload("http://127.0.0.1:9/v1"))
    assert "canary-key" not in repr(caught.value.__dict__)


def test_a_batch_that_the_provider_does_not_know_is_refused_with_404(mock_teacher):
    mock = mock_teacher()

    async def poll() -> None:
        async with BatchClient(TeacherSection(base_url=mock.base_url, model="mock-teacher"), None) as client:
            await client.poll("batch_unknown")

    with pytest.raises(TeacherRefused) as caught:
        asyncio.run(poll())
    assert caught.value.status == 404


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"custom_id": "zz"}', b'{"response": {}}'])
def test_a_broken_result_line_is_named_and_its_bytes_kept(line: bytes):
    with pytest.raises(BrokenAnswer) as caught:
        read_line(line)
    assert caught.value.raw == line


def test_a_redirect_is_not_followed_and_nothing_is_asked_twice():
    """The key would go along to wherever the Location points."""
    sent: list[bytes] = []

    async def upload() -> None:
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
            async with BatchClient(teacher, "canary-key-of-16") as client:
                await client.upload("n", b"{}")

    with pytest.raises(TeacherRefused, match="307"):
        asyncio.run(upload())
    assert sent == [b"POST /v1/files HTTP/1.1"]

"""Test replies that took gigabytes, or blocked the event loop for minutes: they concern one row only."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from harvester.api import parse_in_child, response_format
from harvester.api.http import body_memory
from harvester.api.http.content_encoding import Decoder, EncodingError
from harvester.api.http_values import reset_seconds
from harvester.api.redaction import Redactor
from harvester.api.replies import completion
from harvester.api.types import Outcome
from harvester.errors import BrokenAnswer
from harvester.store.reader import Corpus
from harvester.teacher.limiter.rate_headers import parse_rate_headers
from tests.harvester.killed_runs import ROOT
from tests.hostile.runs import harvest
from tests.hostile.server import completion as good_body
from tests.hostile.server import hostile_teacher, http

Result = TypeVar("Result")


def packed(encoding: str, body: bytes) -> bytes:
    """A reply in nested encodings, the first of the list applied first."""
    for name in encoding.split(","):
        body = gzip.compress(body) if "gzip" in name else zlib.compress(body)
    return http(body, {"content-encoding": encoding})


@pytest.mark.parametrize(
    "encoding", ["gzip,gzip", "deflate, gzip", "gzip, deflate, gzip", "br", "zstd", "gzip" * 5000]
)
def test_an_encoding_that_was_not_asked_for_fails_one_row(encoding: str, tmp_path: Path) -> None:
    evil = (
        packed(encoding, b"0" * (64 << 20)) if "," in encoding else http(b"x", {"content-encoding": encoding})
    )
    with hostile_teacher({"evil": evil}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["evil", "good"])
    assert (ended.exit_code, set(ended.answered)) == (3, {"good"})
    assert ended.dead == {"evil": "broken_answer"}


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "deflate", "identity", "identity, gzip", "GZIP"])
def test_one_encoding_is_read(encoding: str, tmp_path: Path) -> None:
    body = good_body("four")
    with hostile_teacher() as teacher:
        coded = (
            body
            if encoding == "identity"
            else zlib.compress(body)
            if encoding == "deflate"
            else gzip.compress(body)
        )
        teacher.replies["a"] = http(coded, {"content-encoding": encoding})
        assert harvest(tmp_path, teacher.base_url, ["a"]).answered == {"a": "ok"}


TEXT = "Größe: 5 € für “Zoë”"
# A body's charset, the header `content-type`, and the outcome of the answer.
CHARSETS = {
    "utf-8 that is named otherwise": ("utf-8", "application/json; charset=iso-8859-1", "ok"),
    "utf-8 with a mark": ("utf-8-sig", "application/json; charset=utf-16", "ok"),
    "windows-1252": ("cp1252", "application/json; charset=windows-1252", "ok"),
    "windows-1252 under its other name": ("cp1252", 'application/json;charset="ISO-8859-1"', "ok"),
    "utf-16 with a mark": ("utf-16", "application/json", "ok"),
    "utf-16 without a mark": ("utf-16-le", "application/json", "ok"),
    "utf-16 in the other order": ("utf-16-be", "application/json; charset=utf-16", "ok"),
    "utf-32 without a mark": ("utf-32-be", "application/json", "ok"),
    "gb18030": ("gb18030", "application/json; charset=GBK", "ok"),
    "no name": ("cp1252", "application/json", "unknown"),
    "an unknown name": ("cp1252", "application/json; charset=klingon", "unknown"),
    "a name that is no charset": ("cp1252", "application/json; charset=unicode_escape", "unknown"),
    "a name that can not be": ("cp1252", "application/json; charset=euc-jp", "unknown"),
}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_body_in_another_charset_is_read_or_unknown(is_stream: bool, tmp_path: Path) -> None:
    with hostile_teacher() as teacher:
        for prompt, (codec, content_type, _) in CHARSETS.items():
            text = json.dumps(json.loads(good_body(TEXT)), ensure_ascii=False)
            if is_stream:
                text = f"data: {text}\n\ndata: [DONE]\n\n"
                content_type = content_type.replace("application/json", "text/event-stream")
            teacher.replies[prompt] = http(text.encode(codec), {"content-type": content_type})
        ended = harvest(tmp_path, teacher.base_url, list(CHARSETS))
    assert ended.answered == {prompt: outcome for prompt, (_, _, outcome) in CHARSETS.items()}
    rows = list(Corpus.open(ended.store).samples())
    assert {row.completion for row in rows if row.outcome == "ok"} == {TEXT}
    assert all(TEXT in row.raw.decode() for row in rows if row.outcome == "ok")


def test_json_lines_without_an_end_are_asked_again(tmp_path: Path) -> None:
    line = {"model": "m", "message": {"role": "assistant", "content": "fo"}, "done": False}
    cut = b"".join(json.dumps(line).encode() + b"\n" for _ in range(2))
    with hostile_teacher({"a": http(cut, {"content-type": "application/x-ndjson"})}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["a", "b"], run={"max_attempts": 2})
        assert teacher.asked.count("a") == 2
    assert (ended.answered, ended.dead) == ({"b": "ok"}, {"a": "connection"})


WRONG_LENGTHS = {
    "short": (("content-length: 20",), "longer than its Content-Length"),
    "none": (("content-length: 0",), "longer than its Content-Length"),
    "twice": (("content-length: {0}", "content-length: {0}"), "Content-Length is given twice"),
    "two": (("content-length: {0}", "content-length: 5"), "Content-Length is given twice"),
    "list": (("content-length: {0}, {0}",), "Content-Length is no number"),
    "word": (("content-length: many",), "Content-Length is no number"),
    "both": (("content-length: {0}", "transfer-encoding: chunked"), "are both given"),
    "chunks": (("transfer-encoding: chunked",), "not in chunks"),
}


@pytest.mark.parametrize("fault", WRONG_LENGTHS)
def test_a_wrong_length_of_a_body_is_named_and_asked_again_so_many_times(fault: str, tmp_path: Path) -> None:
    headers, words = WRONG_LENGTHS[fault]
    body = good_body("four")
    head = ["HTTP/1.1 200 OK", *(line.format(len(body)) for line in headers)]
    with hostile_teacher({"evil": "\r\n".join(head).encode() + b"\r\n\r\n" + body}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["evil", "good", "better"], run={"max_attempts": 3})
        assert teacher.asked.count("evil") == 3
    assert (ended.exit_code, ended.dead) == (3, {"evil": "connection"})
    assert words in json.loads((ended.store / "dead_letters.jsonl").read_text())["message"]


def test_damaged_utf_8_is_no_text_of_the_charset_that_is_named(tmp_path: Path) -> None:
    damaged = json.dumps(json.loads(good_body(TEXT)), ensure_ascii=False).encode().replace(b"\x82\xac", b"")
    reply = http(damaged, {"content-type": "application/json; charset=iso-8859-1"})
    with hostile_teacher({"a": reply}) as teacher:
        assert harvest(tmp_path, teacher.base_url, ["a"]).answered == {"a": "unknown"}


def test_a_key_in_another_charset_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("KEY_OF_TEST", key)
    body = good_body(f"the key is {key}").decode().encode("utf-16")
    with hostile_teacher({"a": http(body)}) as teacher:
        ended = harvest(tmp_path, teacher.base_url, ["a"], teacher={"api_key_env": "KEY_OF_TEST"})
    (row,) = Corpus.open(ended.store).samples()
    assert (row.outcome, row.completion) == ("ok", "the key is ***")
    assert key.encode() not in row.raw.replace(b"\0", b"")


def test_a_decoder_gives_pieces_of_limited_size_and_reads_what_servers_send() -> None:
    text = b"0123456789" * 200_000
    compressed = gzip.compress(text) + gzip.compress(b"more") + b"\0" * 8
    pieces = [
        piece for start in range(0, len(compressed), 97) for piece in _pieces("gzip", compressed, start)
    ]
    assert b"".join(pieces) == text + b"more"
    assert max(map(len, _pieces("gzip", compressed, None))) <= 256 * 1024
    raw = zlib.compressobj(wbits=-15)
    assert b"".join(_pieces("deflate", raw.compress(text) + raw.flush(), None)) == text
    with pytest.raises(EncodingError):
        list(Decoder("gzip").decode(b"no gzip at all"))


def test_the_first_bytes_of_a_body_count_before_a_wrong_header() -> None:
    plain = good_body("4")
    for encoding in ("utf-8", "none", "aws-chunked", "gzip", "deflate", "br", "gzip, br", ""):
        assert b"".join(_pieces(encoding, plain, None)) == plain, encoding
        assert b"".join(_pieces(encoding, gzip.compress(plain), None)) == plain, encoding
    for byte_by_byte in ("gzip", "br", ""):
        decoder, packed = Decoder(byte_by_byte), gzip.compress(plain)
        pieces = [piece for at in range(len(packed)) for piece in decoder.decode(packed[at : at + 1])]
        assert b"".join(pieces) == plain or byte_by_byte == ""
    with pytest.raises(EncodingError, match="more than one"):
        list(Decoder("gzip").decode(gzip.compress(gzip.compress(plain))))
    with pytest.raises(EncodingError, match="br, not asked for"):
        list(Decoder("br").decode(b"\x0b\x02\x80four\x03"))


_decoders: dict[int, Decoder] = {}


def _pieces(encoding: str, data: bytes, start: int | None) -> Iterator[bytes]:
    if start is None:
        yield from Decoder(encoding).decode(data)
        return
    decoder = _decoders.setdefault(len(data), Decoder(encoding))
    yield from decoder.decode(data[start : start + 97])


def events(*chunks: object) -> bytes:
    return (
        b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    )


def delta(value: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": value}]}


def logprobs_of(tokens: int) -> bytes:
    entry = {"token": "a", "logprob": -1, "bytes": [97], "top_logprobs": [{"token": "a", "logprob": -1}] * 20}
    choice = {"message": {"content": "a" * tokens}, "logprobs": {"content": [entry] * tokens}}
    return json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode()


HEAVY: dict[str, Callable[[], bytes]] = {
    "tool calls": lambda: events(*[delta({"tool_calls": [{"index": n}]}) for n in range(15_000)]),
    "one byte deltas": lambda: events(
        delta({"content": "x" * (1 << 22)}), *[delta({"content": "y"})] * 40_000
    ),
    "empty events": lambda: b"data: {}\n\n" * 250_000,
    "comments": lambda: b":\n" * 1_200_000,
    "empty lists": lambda: b'{"choices":[{"message":{"content":"4"}}],"x":[' + b"[]," * 5_000_000 + b"1]}",
    "objects": lambda: b'{"choices":[{"message":{"content":"4"}}],"x":[' + b'{"":0},' * 2_000_000 + b"1]}",
    "nesting": lambda: b'{"a":' * 3_000_000,
    "brackets": lambda: b"[" * 20_000_000,
    "digits": lambda: b'{"choices":[{"message":{"content":"4"}}],"x":' + b"9" * 8_000_000 + b"}",
    "logprobs": lambda: logprobs_of(3_000),
    "think tags": lambda: good_body("\n<think>x</think>" * 150_000),
    "escapes": lambda: b'{"choices":[{"message":{"content":"' + b"\\u0041" * 1_000_000 + b'"}}]}',
}


async def counting_ticks(work: Coroutine[Any, Any, Result]) -> tuple[Result, int]:
    """Return the result of `work`, and how often the event loop served a timer of 1 ms meanwhile."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    ticking = asyncio.create_task(tick())
    try:
        return await work, ticks
    finally:
        ticking.cancel()


OUTCOMES = {"ok", "unknown", "empty", "tool_call", "BrokenAnswer", "ConnectionBroken"}


@pytest.mark.parametrize("kind", HEAVY)
def test_a_heavy_reply_is_read_while_the_loop_goes_on(kind: str) -> None:
    raw = HEAVY[kind]()
    assert parse_in_child.is_heavy(raw)

    async def read() -> str:
        try:
            redacted = await parse_in_child.redact(Redactor("sk-0123456789abcdef"), raw)
            parsed = await parse_in_child.parse(redacted, 5, None)
        except Exception as error:
            return type(error).__name__
        return str(parsed.outcome)

    outcome, ticks = asyncio.run(counting_ticks(read()))
    assert outcome in OUTCOMES
    assert ticks > 3  # the loop went on meanwhile


def test_most_replies_are_not_heavy() -> None:
    answer = json.dumps(
        {"choices": [{"message": {"content": "word " * 8_000}, "finish_reason": "stop"}]}
    ).encode()
    assert not parse_in_child.is_heavy(answer)
    assert not parse_in_child.is_heavy(events(*[delta({"content": "word "})] * 4_000))
    assert not parse_in_child.is_heavy(logprobs_of(500))


def test_more_elements_than_an_answer_can_have_are_kept_unread() -> None:
    raw = b'{"choices":[{"message":{"content":"4"}}],"x":[' + b"[]," * 2_500_000 + b"1]}"
    assert completion.parse(raw).outcome is Outcome.UNKNOWN


SCHEMAS = {
    "exponential pattern": ({"type": "string", "pattern": "^(a|aa)+$"}, json.dumps("a" * 60 + "b")),
    "nested repetition": ({"patternProperties": {"^(x+x+)+y$": {}}}, json.dumps({"x" * 60: 1})),
    "unique items": (
        {"type": "array", "uniqueItems": True},
        json.dumps([{"a": number} for number in range(20_000)]),
    ),
    "references": (
        {
            "$ref": "#/$defs/a30",
            "$defs": {
                "a0": {"type": "string"},
                **{f"a{n}": {"anyOf": [{"$ref": f"#/$defs/a{n - 1}"}] * 2} for n in range(1, 31)},
            },
        },
        "5",
    ),
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_that_takes_for_ever_matches_nothing_while_the_loop_goes_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_format, "TIMEOUT_S", 0.5)
    schema, text = SCHEMAS[kind]
    asked = {"type": "json_schema", "json_schema": {"schema": schema}}
    parsed, ticks = asyncio.run(counting_ticks(parse_in_child.parse(good_body(text), 5, asked)))
    assert parsed.outcome is Outcome.INVALID
    assert ticks > 3


def test_a_reply_that_can_not_be_searched_for_the_key_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_in_child, "TIMEOUT_S", 0.001)
    with pytest.raises(BrokenAnswer):
        asyncio.run(parse_in_child.redact(Redactor("sk-0123456789abcdef"), b"\\" * (3 << 20)))


def test_long_header_values_are_no_numbers() -> None:
    value = "9" * 60_000 + "x"
    assert reset_seconds(value) is None
    many = {f"x-ratelimit-reset-tokens-{number}": value for number in range(500)}
    assert parse_rate_headers({**many, "x-ratelimit-limit-tokens": "9" * 60_000}) == ()


def test_of_many_large_bodies_only_the_oldest_is_read_on() -> None:
    async def read() -> tuple[int, list[int]]:
        memory, finished, most = body_memory.BodyMemory(1000), [], 0

        async def body(number: int) -> None:
            nonlocal most
            share = memory.share()
            for _ in range(10):
                await share.grow(100)
                most = max(most, memory.used_bytes)
                await asyncio.sleep(0)
            share.end_reading()
            await asyncio.sleep(0)
            finished.append(number)
            share.release()

        await asyncio.gather(*map(body, range(20)))
        assert memory.used_bytes == 0
        return most, finished

    most, finished = asyncio.run(read())
    assert sorted(finished) == list(range(20))
    assert most < 20 * 1000 / 4  # all at once would take 20,000


_ALL_AT_ONCE = """
import asyncio, sys
from tests.hostile.memory import ask
from tests.peak_memory import peak_kib
print(asyncio.run(ask(sys.argv[1], int(sys.argv[2]))))
print(peak_kib() >> 10)
"""


@pytest.mark.parametrize(
    "replies",
    [pytest.param(20, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.long)],
)
def test_hostile_replies_at_once_take_400_mib(replies: int) -> None:
    """Each is 31 MiB when decoded."""
    bomb = gzip.compress(b'{"choices":[{"message":{"content":"' + b"0" * (31 << 20) + b'"}}]}')
    with hostile_teacher() as teacher:
        teacher.replies.update(
            {f"evil {n}": http(bomb, {"content-encoding": "gzip"}) for n in range(replies)}
        )
        out = subprocess.run(
            [sys.executable, "-c", _ALL_AT_ONCE, teacher.base_url, str(replies)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
    answers, mib = out.stdout.split()
    assert int(answers) == replies, out.stderr
    assert int(mib) <= 400

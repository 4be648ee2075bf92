"""Faults on the socket: replies that stop, stall, crawl or are no HTTP at all.

These write to the transport below the HTTP layer, and the connection never survives them.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from harvester.mock_teacher.spoil import Options, SpoiledReply

Receive = Callable[[], Awaitable[Any]]
_HIGH_WATER_BYTES = 2**20
_BLOCK = b"x-filler: " + b"a" * 500 + b"\r\n"


@dataclass(frozen=True, slots=True)
class Line:
    """One connection in the middle of a request: its socket, and how to notice that the caller left."""

    transport: asyncio.Transport
    receive: Receive

    async def until_gone(self) -> None:
        """Wait until the connection is closed by either side."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def reset(self) -> None:
        """Close with RST: what the caller has not read yet is an error to it."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def pour(self, block: bytes, total_bytes: int) -> None:
        """Write a block over and over, no faster than the caller reads."""
        for _ in range(max(1, total_bytes // len(block))):
            while self.transport.get_write_buffer_size() > _HIGH_WATER_BYTES:
                await asyncio.sleep(0.005)
            if self.transport.is_closing():
                return
            self.transport.write(block)


def head_bytes(reply: SpoiledReply, length: int | None) -> bytes:
    """Status line and headers up to the blank line; `length` None announces chunks."""
    try:
        phrase = HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [b"HTTP/1.1 %d %s" % (reply.status, phrase.encode())]
    lines += [name + b": " + value for name, value in reply.headers]
    lines.append(b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def cut(action: str, options: Options, reply: SpoiledReply, line: Line) -> None:
    """Deliver a reply the way an action of stage `wire` says; returns when the connection is gone."""
    body = reply.whole_body()
    part = body[: int(len(body) * options.get("share", 0.5))]
    write = line.transport.write
    if action == "reset":
        line.reset()
    elif action == "reset_body":
        write(head_bytes(reply, len(body)) + part)
        line.reset()
    elif action in _POURED:
        await _POURED[action](options, reply, line)
    elif action in ("silence", "stall_body"):
        if action == "stall_body":
            write(head_bytes(reply, len(body)) + part)
        await line.until_gone()
    else:
        write(_ENDED[action](options, reply, body, part))
        line.transport.close()
    await line.until_gone()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


# What is written before an orderly close (FIN).
_ENDED: dict[str, Callable[[Options, SpoiledReply, bytes, bytes], bytes]] = {
    "fin": lambda _, reply, body, part: b"",
    "cut_body": lambda _, reply, body, part: head_bytes(reply, len(body)) + part,
    "chunk_cut": lambda _, reply, body, part: head_bytes(reply, None) + _chunk(part),
    "fin_headers": lambda _, reply, body, part: head_bytes(reply, len(body))[:-12],
    "garbage_status": lambda o, reply, body, part: (
        str(o.get("value", "ICY 9x9 garbage")).encode() + b"\r\n\r\n" + body
    ),
    "close_idle": lambda _, reply, body, part: head_bytes(reply, len(body)) + body,
}


async def _drip(options: Options, reply: SpoiledReply, line: Line) -> None:
    body = reply.whole_body()
    data = head_bytes(reply, len(body)) + body
    step = options.get("bytes", 1)
    for at in range(0, len(data), step):
        if line.transport.is_closing():
            return
        line.transport.write(data[at : at + step])
        await asyncio.sleep(options.get("interval_s", 0.1))
    line.transport.close()


async def _endless_headers(options: Options, reply: SpoiledReply, line: Line) -> None:
    line.transport.write(b"HTTP/1.1 200 OK\r\n")
    await line.pour(_BLOCK, options.get("bytes", 64 * 2**20))
    line.transport.close()


async def _huge_body(options: Options, reply: SpoiledReply, line: Line) -> None:
    total = options.get("bytes", 64 * 2**20) >> 16 << 16
    line.transport.write(head_bytes(reply, total))
    await line.pour(b" " * 2**16, total)
    line.transport.close()


_POURED: dict[str, Callable[[Options, SpoiledReply, Line], Awaitable[None]]] = {
    "drip": _drip,
    "endless_headers": _endless_headers,
    "huge_body": _huge_body,
}

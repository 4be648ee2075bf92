"""Produce faults on the connection: replies that stop, stall, are very slow, or are no HTTP at all.

They write to the transport below the HTTP layer and end the connection.
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
class CallerConnection:
    """The connection of a caller: its transport, and the ASGI channel that reports a hang-up."""

    transport: asyncio.Transport
    receive: Receive

    async def wait_closed(self) -> None:
        """Wait until the connection is closed by either side."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def hold_back(self) -> None:
        """Keep what is written next in the kernel until the close, so that both leave in one segment."""
        if hasattr(socket, "TCP_CORK"):
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)

    def reset(self) -> None:
        """Close with RST: the caller gets an error instead of the bytes that it has not read yet."""
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def write_repeatedly(self, block: bytes, total_bytes: int) -> None:
        """Write `block` repeatedly, about `total_bytes` in all, no faster than the caller reads."""
        for _ in range(max(1, total_bytes // len(block))):
            while self.transport.get_write_buffer_size() > _HIGH_WATER_BYTES:
                await asyncio.sleep(0.005)
            if self.transport.is_closing():
                return
            self.transport.write(block)


def head_bytes(reply: SpoiledReply, length: int | None) -> bytes:
    """Return status line and headers; `length` None announces chunked encoding."""
    try:
        phrase = HTTPStatus(reply.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [b"HTTP/1.1 %d %s" % (reply.status, phrase.encode())]
    lines += [name + b": " + value for name, value in reply.headers]
    lines.append(b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def cut(action: str, options: Options, reply: SpoiledReply, connection: CallerConnection) -> None:
    """Send a reply with an action of stage `wire`; return when the connection is closed."""
    body = reply.whole_body()
    part = body[: int(len(body) * options.get("share", 0.5))]
    write = connection.transport.write
    if action == "reset":
        connection.reset()
    elif action == "reset_body":
        write(head_bytes(reply, len(body)) + part)
        connection.reset()
    elif action in _GRADUAL:
        await _GRADUAL[action](options, reply, connection)
    elif action in ("silence", "stall_body", "open_end"):
        if action == "stall_body":
            write(head_bytes(reply, len(body)) + part)
        elif action == "open_end":
            write(head_bytes(reply, None) + _chunk(body))
        await connection.wait_closed()
    else:
        connection.hold_back()  # the caller finds the reply and the close together
        write(_CUT[action](options, reply, body, part))
        connection.transport.close()
    await connection.wait_closed()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data) if data else b""


# What is written before an orderly close (FIN).
_CUT: dict[str, Callable[[Options, SpoiledReply, bytes, bytes], bytes]] = {
    "fin": lambda _, reply, body, part: b"",
    "cut_body": lambda _, reply, body, part: head_bytes(reply, len(body)) + part,
    "chunk_cut": lambda _, reply, body, part: head_bytes(reply, None) + _chunk(part),
    "chunk_no_end": lambda _, reply, body, part: head_bytes(reply, None) + _chunk(body),
    "length_no_end": lambda _, reply, body, part: head_bytes(reply, len(body) + 10) + body,
    "fin_headers": lambda _, reply, body, part: head_bytes(reply, len(body))[:-12],
    "garbage_status": lambda o, reply, body, part: (
        str(o.get("value", "ICY 9x9 garbage")).encode() + b"\r\n\r\n" + body
    ),
    "close_idle": lambda _, reply, body, part: head_bytes(reply, len(body)) + body,
}


async def _drip(options: Options, reply: SpoiledReply, connection: CallerConnection) -> None:
    body = reply.whole_body()
    data = head_bytes(reply, len(body)) + body
    step = options.get("bytes", 1)
    for at in range(0, len(data), step):
        if connection.transport.is_closing():
            return
        connection.transport.write(data[at : at + step])
        await asyncio.sleep(options.get("interval_s", 0.1))
    connection.transport.close()


async def _endless_headers(options: Options, reply: SpoiledReply, connection: CallerConnection) -> None:
    connection.transport.write(b"HTTP/1.1 200 OK\r\n")
    await connection.write_repeatedly(_BLOCK, options.get("bytes", 64 * 2**20))
    connection.transport.close()


async def _huge_body(options: Options, reply: SpoiledReply, connection: CallerConnection) -> None:
    total = options.get("bytes", 64 * 2**20) >> 16 << 16
    connection.transport.write(head_bytes(reply, total))
    await connection.write_repeatedly(b" " * 2**16, total)
    connection.transport.close()


_GRADUAL: dict[str, Callable[[Options, SpoiledReply, CallerConnection], Awaitable[None]]] = {
    "drip": _drip,
    "endless_headers": _endless_headers,
    "huge_body": _huge_body,
}

"""Read the body of a request and send the reply, through ASGI or, for faults, below it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from functools import lru_cache

from starlette.types import Receive, Send

from harvester.mock_teacher.cut import CallerConnection, cut
from harvester.mock_teacher.spoil import Options, SpoiledReply
from harvester.mock_teacher.wire import Refusal, error_body

MAX_BODY_BYTES = 64 * 2**20


@lru_cache(maxsize=2)
def _date(unix_s: int) -> bytes:
    return formatdate(unix_s, usegmt=True).encode()


async def read_body(receive: Receive) -> bytes | None:
    """Return the request body, None if the caller hung up before its end.

    Raises:
        Refusal: 413 above `MAX_BODY_BYTES`.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        return body
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise Refusal(413, error_body("Request body too large.", "invalid_request_error", None))
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    return None


@dataclass(frozen=True, slots=True)
class ReplySender:
    """Sends the reply to one caller.

    `statuses` counts the statuses sent. `held` lists the connections that a fault keeps open, so that a
    server that stops can close them.
    """

    connection: CallerConnection
    asgi_send: Send
    statuses: Counter[int]
    held: set[asyncio.Transport]

    def is_gone(self) -> bool:
        """Return whether the caller has closed the connection."""
        return self.connection.transport.is_closing()

    async def send(self, reply: SpoiledReply, per_event_s: float = 0.0) -> None:
        """Send a reply; the events of a stream one by one, `per_event_s` seconds apart."""
        self.statuses[reply.status] += 1
        headers = reply.headers
        if not any(name == b"date" for name, _ in headers):
            headers = [*headers, (b"date", _date(int(time.time())))]
        if reply.events is None:
            headers = [*headers, (b"content-length", b"%d" % len(reply.body))]
        await self.asgi_send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for event in reply.events or ():
            if per_event_s:
                await asyncio.sleep(per_event_s)
            await self.asgi_send({"type": "http.response.body", "body": event, "more_body": True})
        await self.asgi_send({"type": "http.response.body", "body": reply.body})

    async def cut(self, action: str, options: Options, reply: SpoiledReply) -> None:
        """Send a reply with a fault of stage `wire`."""
        self.held.add(self.connection.transport)
        try:
            await cut(action, options, reply, self.connection)
        finally:
            self.held.discard(self.connection.transport)

"""Read the body of one reply over HTTP, up to a limit, as UTF-8.

A body that is complete in itself is an answer also when its transfer breaks off, or never ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import aiohttp
import httpx

from harvester.api import charset, parse_in_child
from harvester.api.http.body_memory import BodyShare
from harvester.api.http.content_encoding import Decoder
from harvester.api.replies import completion
from harvester.errors import PromptRejected

MAX_BODY_BYTES = 32 * 1024 * 1024
# Statuses besides 200 under which an answer may come.
OTHER_SUCCESSES = range(201, 300)
# With these bytes a complete body ends.
_LAST_BYTES = (b"}", b"]")
# What may follow them: white space, and null bytes, which also belong to characters of UTF-16 and UTF-32.
_PADDING = b" \t\r\n\0"


class _BodyStream(httpx.AsyncByteStream):
    """The body of a reply. A transfer that breaks off ends it, with `error` set: it may be complete.

    `inner` is the stream of the transport.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.error: Exception | None = None
        self.inner = cast(httpx.AsyncByteStream, response.stream)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.inner:
                yield chunk
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            self.error = error
            rest = _unread(self.inner)
            if rest:
                yield rest

    async def aclose(self) -> None:
        """Close the connection, or return it for the next request."""
        await self.inner.aclose()


def _reader(stream: httpx.AsyncByteStream) -> aiohttp.StreamReader | None:
    reader = getattr(getattr(stream, "_aiohttp_response", None), "content", None)
    return reader if isinstance(reader, aiohttp.StreamReader) else None


def _unread(stream: httpx.AsyncByteStream) -> bytes:
    """The bytes that arrived before a transfer broke off. aiohttp keeps them, but raises when it is read."""
    reader = _reader(stream)
    if reader is None:
        return b""
    reader.set_exception(cast(Exception, None))
    return reader.read_nowait()


class ReplyReader:
    """Reads the decoded body of one reply as UTF-8, at most `MAX_BODY_BYTES`.

    A body that is complete in itself is an answer also when its transfer breaks off, or never ends.

    Args:
        share: memory that the body is counted in.
        patience_s: silence after which a complete body is taken as it is.
        choices: how many answers a complete body holds.

    Raises:
        EncodingError: the body has an encoding that was not asked for.
    """

    def __init__(
        self, response: httpx.Response, place: str, share: BodyShare, patience_s: float, choices: int
    ) -> None:
        self._response = response
        self._choices = choices
        self._patience_s = patience_s
        self._place = place
        self._share = share
        self._content_type = response.headers.get("content-type", "")
        self._decoder = Decoder(response.headers.get("content-encoding", ""))
        self._received = bytearray()
        self._stream = _BodyStream(response)
        response.stream = self._stream

    @property
    def _needs_end(self) -> bool:
        """Whether the body counts only when it is complete. That of an error status needs no end."""
        return self._response.status_code == 200 or self._response.status_code in OTHER_SUCCESSES

    async def read(self) -> bytes:
        """Return the body.

        Raises:
            PromptRejected: it is too large.
            EncodingError: its encoding is broken.
            httpx.HTTPError, aiohttp.ClientError, OSError: the transfer broke off, and the body is not
                complete.
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle | None = None
        try:
            async for chunk in self._stream:
                if timer is not None:
                    timer.cancel()
                for number, piece in enumerate(self._decoder.decode(chunk)):
                    if number:
                        await asyncio.sleep(0)  # one chunk may decode to many pieces
                    self._received += piece
                    if len(self._received) > MAX_BODY_BYTES:
                        raise self._too_large()
                    await self._share.grow(len(piece))
                if self._received[-8:].rstrip(_PADDING).endswith(_LAST_BYTES):
                    timer = loop.call_later(self._patience_s, self._end_if_complete)
        finally:
            if timer is not None:
                timer.cancel()
        body = await parse_in_child.as_utf8(bytes(self._received), self._content_type)
        error = self._stream.error
        if error is not None and self._needs_end and not await parse_in_child.is_complete(body):
            raise error
        return body

    def _end_if_complete(self) -> None:
        """End the reading, and the connection, when nothing more came after a complete body."""
        reader = _reader(self._stream.inner)
        if reader is not None and self._is_readable():
            reader.set_exception(aiohttp.ClientPayloadError("nothing more came"))

    def _is_readable(self) -> bool:
        """Whether what came is complete."""
        if not self._needs_end:
            return True
        body = bytes(self._received)
        return not parse_in_child.is_heavy(body) and completion.is_complete(
            charset.as_utf8(body, self._content_type), self._choices
        )

    def _too_large(self) -> PromptRejected:
        return PromptRejected(
            f"the reply is larger than {MAX_BODY_BYTES >> 20} MiB",
            status=self._response.status_code,
            maybe_billed=True,
            place=self._place,
        )

"""Send one request over HTTP and return the raw answer; translate errors of httpx and aiohttp into ours.

This is the only module that imports httpx. It uses an aiohttp transport: httpx's own connection pool costs
O(connections) per request and leaks a slot per cancelled request (encode/httpcore#1093). Transports are
called directly, without `httpx.AsyncClient`: there are no redirects to follow, no cookies to keep and no
proxies to choose, and the client would cost 50 us per request for them. Bodies are capped after decoding. One
deadline covers everything from connecting to the last byte, because a timeout per read never fires when bytes
arrive slowly but steadily.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import os
import re
import socket
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from types import TracebackType
from typing import Self, cast
from urllib.parse import urlsplit

import aiohttp
import httpx
import orjson
from httpx_aiohttp import AiohttpTransport

from harvester.api import charset, model_list, parse_in_child
from harvester.api.body_memory import BodyMemory, BodyShare
from harvester.api.content_encoding import Decoder, EncodingError
from harvester.api.error_body import describe, excerpt
from harvester.api.joining import idempotency_key
from harvester.api.max_tokens import positive_max_tokens_of
from harvester.api.redaction import Redactor
from harvester.api.replies import completion
from harvester.api.scoring.request_forms import url_of
from harvester.api.types import RawAnswer, Request
from harvester.config.run_section import BASE_DEADLINE_S, RunSection
from harvester.config.teacher_section import TeacherSection
from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    PromptRejected,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.system import open_files
from harvester.system.command_line.version import __version__

_Headers = list[tuple[bytes, bytes]]
MAX_BODY_BYTES = 32 * 1024 * 1024
# Longest status line and longest header. aiohttp's own limit is 8190 bytes, and real cookies, traces and
# policies are longer.
MAX_HEADER_BYTES = 64 * 1024
# Seconds of silence after which a complete body is taken as it is, though its framing promises more.
FRAMING_PATIENCE_S = 2.0
# Statuses besides 200 under which an answer may come.
_OTHER_SUCCESSES = range(201, 300)
# With these bytes a complete body ends.
_LAST_BYTES = (b"}", b"]")
# What may follow them: white space, and null bytes, which also belong to characters of UTF-16 and UTF-32.
_PADDING = b" \t\r\n\0"
KEEP_ALIVE_S = 60.0
# `error_code` when the host name does not exist, as opposed to a resolver that fails.
UNKNOWN_NAME = "unknown_name"
DNS_CACHE_S = 10
# Request bodies above this size are written in pieces.
PIECE_BYTES = 256 * 1024
USER_AGENT = f"blackbox-distillation/{__version__}"

# A bytes literal in a message of aiohttp.
_QUOTED_BYTES = re.compile(r"""b(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
# How aiohttp's message begins where the framing of a reply is wrong, and the same in plain words.
_FRAMING_FAULTS = (
    ("duplicate content-length", "Content-Length is given twice"),
    ("invalid character in content-length", "Content-Length is no number"),
    ("content-length overflow", "Content-Length is no number of bytes"),
    ("transfer-encoding can't be present", "Content-Length and Transfer-Encoding are both given"),
    ("invalid character in chunk size", "the body is not in chunks, as its Transfer-Encoding says"),
)
# Beginnings of a body where a status line should be.
_BODY_BEGINNINGS = (b"{", b"[", b"data:")
# First bytes of TLS records: an alert, or a handshake.
_TLS_RECORDS = (b"\x15\x03", b"\x16\x03")

# Their error, our error, message, and whether the request may have reached the teacher and been billed. Most
# specific first. httpx_aiohttp turns every aiohttp.ClientConnectionError into a ConnectTimeout, also a reset
# after the request was sent, so the aiohttp cause is looked up before the httpx error.
_TRANSLATIONS: tuple[tuple[type[BaseException], type[TeacherError], str, bool], ...] = (
    (aiohttp.ClientConnectorDNSError, TeacherUnavailable, "the host name can't be resolved", False),
    (aiohttp.ClientConnectorCertificateError, TeacherRefused, "the certificate is not trusted", False),
    (aiohttp.ClientConnectorSSLError, TeacherRefused, "TLS fails", False),
    (aiohttp.ClientProxyConnectionError, TeacherUnavailable, "the proxy can't be reached", False),
    (aiohttp.ClientConnectorError, TeacherUnavailable, "can't connect", False),
    (aiohttp.ConnectionTimeoutError, TeacherUnavailable, "no connection within connect_timeout_s", False),
    (aiohttp.ServerTimeoutError, AttemptTimeout, "no byte in time", True),
    (aiohttp.ClientPayloadError, ConnectionBroken, "the body broke off", True),
    (aiohttp.ClientResponseError, ConnectionBroken, "the reply is not HTTP", True),
    (aiohttp.ServerDisconnectedError, ConnectionBroken, "the connection was closed before a reply", True),
    (aiohttp.ClientConnectionError, ConnectionBroken, "the connection broke", True),
    (httpx.ConnectTimeout, TeacherUnavailable, "no connection within connect_timeout_s", False),
    (httpx.ConnectError, TeacherUnavailable, "can't connect", False),
    (httpx.ProxyError, TeacherUnavailable, "the proxy can't be reached", False),
    (httpx.TimeoutException, AttemptTimeout, "no byte in time", True),
    (httpx.DecodingError, BrokenAnswer, "the body's encoding is broken", True),
    (httpx.TransportError, ConnectionBroken, "the connection broke", True),
    (httpx.HTTPError, ConnectionBroken, "the HTTP connection failed", True),
    (aiohttp.ClientError, ConnectionBroken, "the HTTP connection failed", True),
    (EncodingError, BrokenAnswer, "the body can't be decoded", True),
    (OSError, ConnectionBroken, "the connection broke", True),
    (ValueError, ConnectionBroken, "the reply is not HTTP", True),
)


@dataclass(frozen=True, slots=True)
class _Expected:
    """What one exchange may take, from connecting to the last byte, and how many answers it brings."""

    deadline_s: float
    choices: int = 1


class Client:
    """Sends requests to one teacher, with one httpx transport per endpoint.

    Args:
        teacher: base URLs and limits.
        run: deadlines and whether proxy variables are honoured.
        key: the credential, sent to the teacher's own endpoints only; None for none.
        transport: replaces all transports, for tests.
    """

    def __init__(
        self,
        teacher: TeacherSection,
        run: RunSection,
        key: str | None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._teacher = teacher
        self._run = run
        self._redactor = Redactor(key)
        self._memory = BodyMemory()
        self._headers = [
            (b"user-agent", USER_AGENT.encode()),
            (b"accept", b"application/json"),
            (b"accept-encoding", b"gzip, deflate"),
            *([(b"authorization", f"Bearer {key}".encode("ascii"))] if key else []),
        ]
        self._timeout = httpx.Timeout(None, connect=run.connect_timeout_s)
        self._transports = {base: transport or self._transport(base) for base in teacher.base_urls}
        self._urls: dict[tuple[str, str], httpx.URL] = {}

    def _transport(self, base: str) -> httpx.AsyncBaseTransport:
        context = self._context(base)

        def session() -> aiohttp.ClientSession:
            # The limiter's window bounds the connections; a second limit here could only deadlock with it.
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=DNS_CACHE_S, ssl=context
            )
            return aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=self._run.trust_env,
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
            )

        made: httpx.AsyncBaseTransport = AiohttpTransport(verify=context, client=session)
        return made

    def _context(self, base: str) -> ssl.SSLContext:
        """A context that always verifies, against the public roots and `[teacher] ca_file`."""
        if not base.startswith("https:"):
            # Plain HTTP: a context that trusts nothing. Reading the public roots would take 25 ms.
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context = httpx.create_ssl_context(trust_env=self._run.trust_env)
        if self._teacher.ca_file is not None:
            context.load_verify_locations(self._teacher.ca_file)
        return context

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        for transport in self._transports.values():
            await transport.aclose()

    async def send(self, request: Request, endpoint: str) -> RawAnswer:
        """Make one attempt at `endpoint`, one of the teacher's base URLs.

        Raises:
            TeacherError: anything but a 200, as the class it means; `maybe_billed` says whether the teacher
                may have generated an answer.
        """
        content = orjson.dumps(request.body)
        length = (b"content-length", b"%d" % len(content))  # without it, a body in pieces is sent chunked
        headers = [*self._headers, (b"content-type", b"application/json"), length]
        if self._teacher.idempotency_header:  # the same for all attempts of a request
            headers.append((self._teacher.idempotency_header.encode(), idempotency_key(request).encode()))
        choices = len(request.each)  # some servers generate them one after another
        deadline_s = self._run.deadline_for(positive_max_tokens_of(request.body) * choices)
        expected = _Expected(deadline_s, choices)
        url = self._url(endpoint, request.path)
        with self._naming_errors(url):
            answer = await self._exchange("POST", url, endpoint, headers, content, expected)
            if answer.status != 200 and not await _is_answer(answer):
                raise await self._refusal(answer, url)
        return answer

    def _url(self, endpoint: str, path: str) -> httpx.URL:
        url = self._urls.get((endpoint, path))
        if url is None:
            url = self._urls[endpoint, path] = httpx.URL(url_of(endpoint, path))
        return url

    @contextlib.contextmanager
    def _naming_errors(self, url: httpx.URL) -> Iterator[None]:
        """Turn whatever one exchange raises into a `TeacherError`: it is the matter of one row.

        A cancellation that nobody asked for is one of the transport's own.
        """
        try:
            yield
        except (TeacherError, MemoryError):
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ConnectionBroken(
                "the HTTP connection failed: the request was cancelled", maybe_billed=True, place=_place(url)
            ) from None
        except Exception as error:
            detail = self._redactor.string(describe(error))
            raise BrokenAnswer(
                f"the reply can't be handled: {detail}", maybe_billed=True, place=_place(url)
            ) from error

    async def _refusal(self, answer: RawAnswer, url: httpx.URL) -> TeacherError:
        try:
            return await parse_in_child.refusal(answer.status, answer.headers, answer.body, _place(url))
        finally:
            answer.release()

    async def redact(self, body: bytes) -> bytes:
        """Remove the credential from the body of one choice, in case only its split made it readable.

        Raises:
            BrokenAnswer: see `parse_in_child.redact`.
        """
        return await parse_in_child.redact(self._redactor, body)

    async def models(self, base: str) -> list[str]:
        """Return the models that a base URL of the teacher lists; empty where it has no list for this key.

        A key that may chat need not be allowed to list models: what counts is the first request.

        Raises:
            TeacherRefused: not authorised, or redirected.
            TeacherError: the endpoint could not be reached; `status` is None.
        """
        url = httpx.URL(f"{base}/models")
        deadline_s = self._run.deadline_s or BASE_DEADLINE_S
        with self._naming_errors(url):
            try:
                answer = await self._exchange("GET", url, base, self._headers, b"", _Expected(deadline_s))
            except PromptRejected as error:
                raise TeacherRefused(
                    f"the list of models can't be read: {error.message}",
                    status=error.status,
                    remedy="is base_url right?",
                ) from None
            if answer.status in {401, 402} or 300 <= answer.status < 400:
                refusal = await self._refusal(answer, url)
                if not model_list.is_about_listing(refusal.message):
                    raise refusal
            answer.release()
            return await parse_in_child.model_ids(answer.body) if answer.status == 200 else []

    async def _exchange(
        self,
        method: str,
        url: httpx.URL,
        endpoint: str,
        headers: _Headers,
        content: bytes,
        expected: _Expected,
    ) -> RawAnswer:
        request = httpx.Request(
            method,
            url,
            headers=headers,
            # Written at once, a large body (an image) would block the event loop.
            content=content if len(content) <= PIECE_BYTES else _in_pieces(content),
            extensions={"timeout": self._timeout.as_dict()},
        )
        started_s = time.monotonic()
        share = self._memory.share()
        try:
            answer = await self._read_reply(request, endpoint, share, expected)
        except BaseException:
            share.release()
            raise
        finally:
            share.end_reading()
        answer = replace(answer, latency_s=time.monotonic() - started_s, release=share.release)
        weakref.finalize(answer, share.release).atexit = False  # for an answer that nobody releases
        return answer

    async def _read_reply(
        self, request: httpx.Request, endpoint: str, share: BodyShare, expected: _Expected
    ) -> RawAnswer:
        url, deadline_s = request.url, expected.deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                response = await self._transports[endpoint].handle_async_request(request)
                raw_headers = response.headers.raw
                # Unless it is set, httpx decodes all headers once more to guess their encoding.
                response.headers.encoding = "latin-1"
                patience_s = min(FRAMING_PATIENCE_S, deadline_s / 2)
                reading = _Reading(response, _place(url), share, patience_s, expected.choices)
                try:
                    body = await reading.read()
                finally:
                    await response.aclose()
        except TimeoutError:
            raise AttemptTimeout(
                f"no last byte within {deadline_s:g} s", maybe_billed=True, place=_place(url)
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError, OSError, ValueError) as error:
            raise _translate(error, url, self._redactor) from error
        received_at = time.time()
        names = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in raw_headers}
        # Absolute times in headers are read relative to this one; few servers leave it out.
        if "date" not in names:
            names["date"] = formatdate(received_at, usegmt=True)
        return RawAnswer(
            status=response.status_code,
            headers=self._redactor.headers(names),
            body=await parse_in_child.redact(self._redactor, body),
            endpoint=endpoint,
            latency_s=0.0,
            received_at=received_at,
        )


async def _is_answer(answer: RawAnswer) -> bool:
    """Whether a reply with another status than 200 is an answer: some gateways send 201, 202 or 203."""
    return answer.status in _OTHER_SUCCESSES and await parse_in_child.has_choices(answer.body)


async def _in_pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]


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


class _Reading:
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
        return self._response.status_code == 200 or self._response.status_code in _OTHER_SUCCESSES

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


def _translate(error: BaseException, url: httpx.URL, redactor: Redactor) -> TeacherError:
    """Our error for one of httpx or aiohttp: by the first row that fits its cause, else the error itself."""
    causes = [cause for cause in (error.__cause__, error) if cause is not None]
    for cause in causes:
        for theirs, ours, message, maybe_billed in _TRANSLATIONS:
            if isinstance(cause, theirs):
                if isinstance(cause, OSError) and cause.errno in open_files.SHORTAGE:
                    return TeacherUnavailable(
                        "no file descriptor is left to connect with",
                        error_code=open_files.CODE,
                        place=_place(url),
                    )
                detail = excerpt(redactor.string(_detail(cause)))
                code = UNKNOWN_NAME if _is_unknown_host(cause) else ""
                message = f"{message}: {detail}" if detail else message
                return ours(message, error_code=code, maybe_billed=maybe_billed, place=_place(url))
    return ConnectionBroken("the HTTP connection failed", maybe_billed=True, place=_place(url))


def _is_unknown_host(cause: BaseException) -> bool:
    return (
        isinstance(cause, aiohttp.ClientConnectorDNSError)
        and isinstance(cause.os_error, socket.gaierror)
        and cause.os_error.errno in {socket.EAI_NONAME, socket.EAI_NODATA}
    )


def _detail(cause: BaseException) -> str:
    """The reason in plain words: of the system or of TLS where the connection was never made."""
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return ""
    if isinstance(cause, aiohttp.ClientResponseError):
        return _received(cause.message)
    inner = getattr(cause, "certificate_error", None) or getattr(cause, "os_error", None)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return inner.verify_message
    if isinstance(inner, ssl.SSLError) and inner.reason:
        return inner.reason.replace("_", " ").lower()
    if isinstance(inner, socket.gaierror) or not isinstance(inner, OSError):
        return str(getattr(inner, "strerror", "") or cause)
    return os.strerror(inner.errno).lower() if inner.errno else str(inner)


def _received(message: str) -> str:
    """What came instead of HTTP: the bytes that aiohttp's message quotes, or else its first line."""
    quoted = _QUOTED_BYTES.search(message)
    if quoted is None:
        return message.split("\n", 1)[0].rstrip(":").lower()
    received = ast.literal_eval(quoted[0])
    if received.startswith(_TLS_RECORDS):
        return "TLS, so base_url should begin with https://"
    what = f"{received.decode('utf-8', 'replace')!r} was received"
    start = message.lower()
    for beginning, fault in _FRAMING_FAULTS:
        if start.startswith(beginning):
            return f"{fault}: {what}"
    if start.startswith("bad status line") and received.lstrip().startswith(_BODY_BEGINNINGS):
        return f"a body is longer than its Content-Length: {what}"
    return what


def _place(url: httpx.URL) -> str:
    parts = urlsplit(str(url))
    return f"{parts.netloc}{parts.path}"

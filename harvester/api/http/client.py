"""Send one request over HTTP and return the raw answer.

It uses an aiohttp transport: httpx's own connection pool costs O(connections) per request and leaks a
slot per cancelled request (encode/httpcore#1093). Transports are called directly, without
`httpx.AsyncClient`: there are no redirects to follow, no cookies to keep and no proxies to choose, and
the client would cost 50 us per request for them. Bodies are capped after decoding. One deadline covers
everything from connecting to the last byte, because a timeout per read never fires when bytes arrive
slowly but steadily.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from email.utils import formatdate
from types import TracebackType
from typing import Self

import aiohttp
import httpx
import orjson
from httpx_aiohttp import AiohttpTransport

from harvester.api import model_list, parse_in_child
from harvester.api.error_body import describe
from harvester.api.http.body_memory import BodyMemory, BodyShare
from harvester.api.http.reply_reader import OTHER_SUCCESSES, ReplyReader
from harvester.api.http.transport_errors import place_of, translate
from harvester.api.joining import idempotency_key
from harvester.api.max_tokens import positive_max_tokens_of
from harvester.api.redaction import Redactor
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
)
from harvester.system.command_line.version import __version__

_Headers = list[tuple[bytes, bytes]]
# Longest status line and longest header. aiohttp's own limit is 8190 bytes, and real cookies, traces and
# policies are longer.
MAX_HEADER_BYTES = 64 * 1024
# Seconds of silence after which a complete body is taken as it is, though its framing promises more.
FRAMING_PATIENCE_S = 2.0
KEEP_ALIVE_S = 60.0
DNS_CACHE_S = 10
# Request bodies above this size are written in pieces.
PIECE_BYTES = 256 * 1024
USER_AGENT = f"blackbox-distillation/{__version__}"


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
                "the HTTP connection failed: the request was cancelled",
                maybe_billed=True,
                place=place_of(url),
            ) from None
        except Exception as error:
            detail = self._redactor.string(describe(error))
            raise BrokenAnswer(
                f"the reply can't be handled: {detail}", maybe_billed=True, place=place_of(url)
            ) from error

    async def _refusal(self, answer: RawAnswer, url: httpx.URL) -> TeacherError:
        try:
            return await parse_in_child.refusal(answer.status, answer.headers, answer.body, place_of(url))
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
                reading = ReplyReader(response, place_of(url), share, patience_s, expected.choices)
                try:
                    body = await reading.read()
                finally:
                    await response.aclose()
        except TimeoutError:
            raise AttemptTimeout(
                f"no last byte within {deadline_s:g} s", maybe_billed=True, place=place_of(url)
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError, OSError, ValueError) as error:
            raise translate(error, url, self._redactor) from error
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
    return answer.status in OTHER_SUCCESSES and await parse_in_child.has_choices(answer.body)


async def _in_pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), PIECE_BYTES):
        yield content[start : start + PIECE_BYTES]

"""Translate the errors of httpx and aiohttp into ours, with the reason in plain words."""

from __future__ import annotations

import ast
import os
import re
import socket
import ssl
from urllib.parse import urlsplit

import aiohttp
import httpx

from harvester.api.error_body import excerpt
from harvester.api.http.content_encoding import EncodingError
from harvester.api.redaction import Redactor
from harvester.errors import (
    AttemptTimeout,
    BrokenAnswer,
    ConnectionBroken,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.system import open_files

# `error_code` when the host name does not exist, as opposed to a resolver that fails.
UNKNOWN_NAME = "unknown_name"

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


def translate(error: BaseException, url: httpx.URL, redactor: Redactor) -> TeacherError:
    """Return our error for one of httpx or aiohttp: by the first row that fits its cause, else the error."""
    causes = [cause for cause in (error.__cause__, error) if cause is not None]
    for cause in causes:
        for theirs, ours, message, maybe_billed in _TRANSLATIONS:
            if isinstance(cause, theirs):
                if isinstance(cause, OSError) and cause.errno in open_files.SHORTAGE:
                    return TeacherUnavailable(
                        "no file descriptor is left to connect with",
                        error_code=open_files.CODE,
                        place=place_of(url),
                    )
                detail = excerpt(redactor.string(_detail(cause)))
                code = UNKNOWN_NAME if _is_unknown_host(cause) else ""
                message = f"{message}: {detail}" if detail else message
                return ours(message, error_code=code, maybe_billed=maybe_billed, place=place_of(url))
    return ConnectionBroken("the HTTP connection failed", maybe_billed=True, place=place_of(url))


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


def place_of(url: httpx.URL) -> str:
    """Return where an error happened: the host and the path of a URL."""
    parts = urlsplit(str(url))
    return f"{parts.netloc}{parts.path}"

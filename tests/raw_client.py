"""HTTP clients for tests that show the mock teacher's bytes unchanged."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


def body_of(text: str, **fields: Any) -> dict[str, Any]:
    """Return a chat request body at temperature 0 for one user message."""
    return {
        "model": "mock-teacher",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        **fields,
    }


@dataclass(frozen=True)
class Heard:
    """An HTTP reply; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def text(self, choice: int = 0) -> str:
        return self.json()["choices"][choice]["message"]["content"]

    def events(self) -> list[Any]:
        """Return the parsed data events of a stream, `[DONE]` as that string."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Caller:
    """One kept-alive connection to a teacher."""

    def __init__(self, base_url: str, key: str | None = None) -> None:
        url = urlsplit(base_url)
        self._path = url.path
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._line = http.client.HTTPConnection(url.hostname or "", url.port, timeout=60)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def send(self, body: Mapping[str, Any] | bytes, path: str = "/chat/completions") -> Heard:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._exchange("POST", path, raw)

    def get(self, path: str) -> Heard:
        return self._exchange("GET", path, None)

    def ask(self, text: str, **fields: Any) -> Heard:
        return self.send(body_of(text, **fields))

    def _exchange(self, method: str, path: str, raw: bytes | None) -> Heard:
        self._line.request(method, self._path + path, raw, self._headers)
        reply = self._line.getresponse()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        return Heard(reply.status, headers, reply.read())


def once(base_url: str, text: str = "What is 12 + 30?", **fields: Any) -> Heard:
    """Send one request on a connection of its own."""
    with Caller(base_url) as caller:
        return caller.ask(text, **fields)


@dataclass(frozen=True)
class Ending:
    """Every byte that came, and how it stopped: "fin", "reset" or "silence" (nothing for `patience_s`)."""

    data: bytes
    how: str


def raw(
    base_url: str,
    text: str = "What is 12 + 30?",
    *,
    patience_s: float = 0.3,
    most_bytes: int = 2**30,
    **fields: Any,
) -> Ending:
    """Send one chat request over a bare socket and read until the bytes stop."""
    url = urlsplit(base_url)
    content = json.dumps(body_of(text, **fields)).encode()
    head = f"POST {url.path}/chat/completions HTTP/1.1\r\nhost: {url.netloc}\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=60) as line:
        line.sendall(head.encode() + content)
        line.settimeout(patience_s)
        data = bytearray()
        while len(data) < most_bytes:
            try:
                part = line.recv(65536)
            except TimeoutError:
                return Ending(bytes(data), "silence")
            except ConnectionResetError:
                return Ending(bytes(data), "reset")
            if not part:
                return Ending(bytes(data), "fin")
            data += part
    return Ending(bytes(data), "enough")

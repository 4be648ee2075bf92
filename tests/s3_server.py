"""Run a real S3 server (moto) on loopback as a process of its own, and a proxy in front of it that fails."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

BUCKET = "corpora"
# What the clients need; moto takes any credential.
ENVIRONMENT: Mapping[str, str] = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


class S3Server:
    """moto's server. `request` speaks to it without a client library.

    Attributes:
        port: where it listens; the same after `start` anew, though its objects are gone then.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.start()

    def start(self) -> None:
        """Start it and make the bucket."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None, self._log.read_text()
            try:
                self.request("PUT", f"/{BUCKET}")
            except OSError:
                assert time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """Kill it."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Send a request as it is; moto checks no signature."""
        url = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(url, body, method=method)
        request.add_header(
            "Authorization", "AWS4-HMAC-SHA256 Credential=testing/20260101/us-east-1/s3/aws4_request"
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of all objects of the bucket."""
        listing = self.request("GET", f"/{BUCKET}?list-type=2&max-keys=1000").decode()
        names = [part.split("</Key>")[0] for part in listing.split("<Key>")[1:]]
        return sorted(name for name in names if name.startswith(prefix))

    def get(self, name: str) -> bytes:
        """Return an object."""
        return self.request("GET", f"/{BUCKET}/{name}")

    def put(self, name: str, content: bytes) -> None:
        """Write an object, as somebody else would."""
        self.request("PUT", f"/{BUCKET}/{name}", content)

    def delete(self, name: str) -> None:
        """Delete an object, as somebody else would."""
        self.request("DELETE", f"/{BUCKET}/{name}")

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command that uses it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}


@contextlib.contextmanager
def running(log: Path) -> Iterator[S3Server]:
    """Run the server during the block."""
    server = S3Server(log)
    try:
        yield server
    finally:
        server.kill()


class FaultProxy:
    """Forwards connections to a server, one request each, and lets a rule change what happens.

    Args:
        rule: is called with method and path of each request; returns "" to forward it, "500" or "403" to
            answer so, "cut" to close the connection amid the answer, "cut upload" amid the request, "slow" to
            wait a second before.

    Attributes:
        fired: the requests that met a fault: method, path, fault.
        seen: all requests.
    """

    def __init__(self, port: int, rule: Callable[[str, str], str]) -> None:
        self._target, self._rule = port, rule
        self.fired: list[tuple[str, str, str]] = []
        self.seen: list[tuple[str, str]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a command that goes through it."""
        return {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def close(self) -> None:
        """Take no more connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, ValueError):
            client.settimeout(30)
            head, begin_of_body = _head(client)
            if not head:
                return
            method, path, _ = head[0].split(" ", 2)
            self.seen.append((method, path))
            fault = self._rule(method, path)
            if fault:
                self.fired.append((method, path, fault))
            if fault == "cut upload":
                return
            if fault in _REFUSALS:
                client.sendall(_refusal(fault, is_head=method == "HEAD"))
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):  # else the client might lose the answer to a reset
                    pass
                return
            if fault == "slow":
                time.sleep(1)
            lines = [line for line in head if not line.lower().startswith("connection:")]
            with socket.create_connection(("127.0.0.1", self._target), 30) as server:
                request = "\r\n".join([*lines, "Connection: close"]).encode("latin-1")
                server.sendall(request + b"\r\n\r\n" + begin_of_body)
                threading.Thread(target=_copy, args=(client, server), daemon=True).start()
                if fault != "cut":
                    _copy(server, client)
                    return
                answer = b""
                while chunk := server.recv(1 << 16):
                    answer += chunk
                client.sendall(answer[: len(answer) // 2])
                client.shutdown(socket.SHUT_RDWR)  # closing waits for the other thread


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)


_REFUSALS = {"500": ("Internal Server Error", "InternalError"), "403": ("Forbidden", "AccessDenied")}


def _refusal(status: str, *, is_head: bool) -> bytes:
    reason, code = _REFUSALS[status]
    body = "" if is_head else f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>"
    return (
        f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def _head(client: socket.socket) -> tuple[list[str], bytes]:
    """Read a request's lines, and what has come of its body with them."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = client.recv(1 << 16)
        if not chunk:
            return [], b""
        received += chunk
    head, _, rest = received.partition(b"\r\n\r\n")
    return head.decode("latin-1").split("\r\n"), rest


def refused(port: int) -> bool:
    """Return whether nobody listens at a port."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60)
    except urllib.error.HTTPError:
        return False
    except OSError:
        return True
    return False


def clean_environment() -> dict[str, str]:
    """Return this process's environment without anything of a cloud."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}

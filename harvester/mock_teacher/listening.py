"""Run the server: open a socket, start uvicorn on it, end it in an orderly way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from harvester.errors import ConfigError
from harvester.mock_teacher.routes import application
from harvester.mock_teacher.server import MockTeacher
from harvester.mock_teacher.settings import MockSettings

_BACKLOG = 2048


class TransportProtocol(H11Protocol):
    """uvicorn's HTTP protocol; puts the transport into `scope["state"]` for faults below HTTP."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # asyncio does this itself only for sockets whose protocol number is set, which
        # `socket.create_server` leaves 0; without it replies wait 40 ms for a delayed ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.app_state = {**self.app_state, "transport": transport}
        super().connection_made(transport)


class MockServer(uvicorn.Server):
    """uvicorn's server; waits for an event instead of polling, and exits with 0 on a signal."""

    def __init__(self, settings: MockSettings, ready: Callable[[str], None] | None, grace_s: int) -> None:
        self.teacher = MockTeacher(settings)
        config = uvicorn.Config(
            application(self.teacher),
            http=TransportProtocol,
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            date_header=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive_s,
            timeout_graceful_shutdown=grace_s,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.private_key,
        )
        super().__init__(config)
        self._ready = ready
        self._socket = _listen(settings.host, settings.port)
        scheme = "https" if settings.certificate else "http"
        host, port = self._socket.getsockname()[:2]
        self.base_url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exit = asyncio.Event()

    async def listen(self) -> None:
        """Serve until `leave` or a signal."""
        try:
            await self.serve(sockets=[self._socket])
        finally:
            self._socket.close()
            self.teacher.answerer.close()
            self.teacher.ledger.close()

    async def main_loop(self) -> None:
        """Announce the address, then wait until `leave` is called."""
        self._loop = asyncio.get_running_loop()
        if self._ready is not None:
            self._ready(self.base_url)
        if not self.should_exit:
            await self._exit.wait()

    def leave(self) -> None:
        """Stop serving, from any thread or a signal handler. A second call stops at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._exit.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM for uvicorn; the process then exits with 0."""
        self.leave()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the connections that faults keep open, then shut down as uvicorn does."""
        for transport in list(self.teacher.held):
            transport.abort()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror}",
            place="mock teacher",
            remedy="choose another --port, or 0 for a free one",
        ) from error


def serve(settings: MockSettings, ready: Callable[[str], None] | None = None) -> None:
    """Run a mock teacher in this process until SIGINT or SIGTERM, then return.

    `ready` gets the base URL (`http://127.0.0.1:PORT/v1`) once requests are served.

    Raises:
        ConfigError: the port is taken, the key's variable is unset, the ledger can't be written.
    """
    server = MockServer(settings, ready, grace_s=1)
    asyncio.run(server.listen())

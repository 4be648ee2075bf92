"""Serve the control socket of a running harvest: one JSON line in, one JSON line out.

Only the process that holds the store's lock serves, so a socket left behind by a killed run is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, HarvesterError, StoreError
from harvester.run.control.protocol import (
    MAX_REQUEST_BYTES,
    error_reply,
    reply_line,
    socket_address,
)
from harvester.store import paths
from harvester.system import disk_refusal

Act = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
OnError = Callable[[Exception], None]

# A client that sends no complete line in this time is disconnected.
READ_WITHIN_S = 5.0


@contextlib.asynccontextmanager
async def served(store: Path, act: Act, on_error: OnError) -> AsyncIterator[None]:
    """Answer requests until the block ends; then the socket is removed.

    Args:
        act: executes a request and returns the reply; a HarvesterError becomes an error reply.
        on_error: gets the reason when no socket can be made, and faults of `act`. The harvest goes on.
    """
    try:
        listener = _listen(store)
    except StoreError as error:
        on_error(error)
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, act, on_error)

    server = await asyncio.start_unix_server(answer, sock=listener, limit=MAX_REQUEST_BYTES)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            (store / paths.CONTROL_SOCKET).unlink()


def _listen(store: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        (store / paths.CONTROL_SOCKET).unlink(missing_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # on Linux the name is created with the socket's mode
        with socket_address(store) as path:
            listener.bind(path)
        (store / paths.CONTROL_SOCKET).chmod(0o600)
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise StoreError(
            f"can't be made: {disk_refusal.reason(error)}",
            place=str(store / paths.CONTROL_SOCKET),
            remedy=disk_refusal.remedy(error) or "check the folder; a signal controls this run, too",
        ) from None
    return listener


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, act: Act, on_error: OnError
) -> None:
    try:
        async with asyncio.timeout(READ_WITHIN_S):
            request = await reader.readline()
            writer.write(reply_line(await _reply(request, act, on_error)))
            await writer.drain()
    except (OSError, TimeoutError, ValueError):
        pass  # the client has gone, or sent no line in time
    except asyncio.CancelledError:
        pass  # the run has ended; Python 3.11 would report a connection that is cancelled with a traceback
    finally:
        writer.close()


async def _reply(line: bytes, act: Act, on_error: OnError) -> Mapping[str, Any]:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return error_reply("not a JSON line")
    try:
        if not isinstance(request, dict):
            raise ConfigError("a request is a JSON object with a verb")
        return await act(request)
    except HarvesterError as error:
        return error_reply(error.message, error.remedy)
    except Exception as error:  # noqa: BLE001 - no request ends a harvest, and each gets a reply
        on_error(error)
        return error_reply(f"this request failed in the job ({type(error).__name__}); the job goes on")

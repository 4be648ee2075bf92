"""The job's end of the Unix socket in its store (0600): one JSON line in, one JSON line out.

Only whoever holds the store's lock serves, so a socket left behind by a killed job is removed.
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
from harvester.run.control.client import LONGEST_LINE, address
from harvester.store import paths

Act = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
Complain = Callable[[Exception], None]
READ_WITHIN_S = 5.0


@contextlib.asynccontextmanager
async def served(store: Path, act: Act, complain: Complain) -> AsyncIterator[None]:
    """Answer until the block ends; then the socket is gone.

    Args:
        act: what to do about a request, and what to say; a HarvesterError is said, not raised.
        complain: hears why there is no socket; a file system that knows none is no reason not to harvest.
    """
    try:
        line = _listen(store)
    except StoreError as error:
        complain(error)
        yield
        return

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _answer(reader, writer, act, complain)

    server = await asyncio.start_unix_server(answer, sock=line, limit=LONGEST_LINE)
    try:
        yield
    finally:
        server.close()
        with contextlib.suppress(OSError):
            (store / paths.CONTROL_SOCKET).unlink()


def _listen(store: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        (store / paths.CONTROL_SOCKET).unlink(missing_ok=True)
        os.fchmod(line.fileno(), 0o600)  # on Linux the name is born with the socket's mode
        with address(store) as path:
            line.bind(path)
        (store / paths.CONTROL_SOCKET).chmod(0o600)
        line.listen(8)
    except OSError as error:
        line.close()
        raise StoreError(
            f"can't be made: {error.strerror}", place=str(store / paths.CONTROL_SOCKET)
        ) from None
    return line


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, act: Act, complain: Complain
) -> None:
    try:
        async with asyncio.timeout(READ_WITHIN_S):
            asked = await reader.readline()
            writer.write(await _said(asked, act, complain) + b"\n")
            await writer.drain()
    except (OSError, TimeoutError, ValueError):
        pass  # whoever asked has gone, or says nothing
    finally:
        writer.close()


async def _said(asked: bytes, act: Act, complain: Complain) -> bytes:
    try:
        loaded = json.loads(asked)
    except (ValueError, RecursionError):
        return json.dumps({"error": "not a JSON line"}).encode()
    try:
        if not isinstance(loaded, dict):
            raise ConfigError("a request is a JSON object with a verb")
        return json.dumps(await act(loaded)).encode()
    except HarvesterError as error:
        return json.dumps({"error": error.message, "remedy": error.remedy}).encode()
    except Exception as error:  # noqa: BLE001 - no request ends a harvest, and each gets a word
        complain(error)
        said = f"this request made the job stumble ({type(error).__name__}); it goes on"
        return json.dumps({"error": said}).encode()

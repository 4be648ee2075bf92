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
from harvester.remote import LONGEST_LINE, NAME, address

Act = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
READ_WITHIN_S = 5.0


@contextlib.asynccontextmanager
async def served(store: Path, act: Act, complain: Callable[[Exception], None]) -> AsyncIterator[None]:
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
    server = await asyncio.start_unix_server(lambda r, w: _answer(r, w, act), sock=line, limit=LONGEST_LINE)
    try:
        yield
    finally:
        server.close()
        (store / NAME).unlink(missing_ok=True)


def _listen(store: Path) -> socket.socket:
    (store / NAME).unlink(missing_ok=True)
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(line.fileno(), 0o600)  # on Linux the name is born with the socket's mode
        with address(store) as path:
            line.bind(path)
        (store / NAME).chmod(0o600)
        line.listen(8)
    except OSError as error:
        line.close()
        raise StoreError(f"can't be made: {error.strerror}", place=str(store / NAME)) from None
    return line


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, act: Act) -> None:
    with contextlib.suppress(OSError, TimeoutError, ValueError):
        async with asyncio.timeout(READ_WITHIN_S):
            asked = await reader.readline()
            writer.write(json.dumps(await _said(asked, act)).encode() + b"\n")
            await writer.drain()
    writer.close()


async def _said(asked: bytes, act: Act) -> Mapping[str, Any]:
    try:
        loaded = json.loads(asked)
        if not isinstance(loaded, dict):
            raise ConfigError("a request is a JSON object with a verb")
        return await act(loaded)
    except HarvesterError as error:
        return {"error": error.message, "remedy": error.remedy}
    except (ValueError, RecursionError):
        return {"error": "not a JSON line"}

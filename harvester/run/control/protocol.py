"""Define the control socket: its address, its commands, and one JSON line as request and as reply.

Both ends import this module. It loads little, so that `harvester status` starts fast.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from harvester.store import paths

# `sockaddr_un` holds 108 bytes with the closing NUL (unix(7)).
MAX_ADDRESS_BYTES = 100

MAX_REQUEST_BYTES = 64 * 1024

# A reply may hold a whole status.
MAX_REPLY_BYTES = 16 * 1024 * 1024


class Command(StrEnum):
    """What may be asked of a running harvest; the value stands under `verb` in the request."""

    STATUS = "status"
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    SET = "set"


@contextmanager
def socket_address(store: Path) -> Iterator[str]:
    """Give a path of the socket that is short enough for a socket address, however long the store's is."""
    path = str(store.resolve() / paths.CONTROL_SOCKET)
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield path
        return
    folder = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{paths.CONTROL_SOCKET}"
    finally:
        os.close(folder)


def request_line(command: str, arguments: Mapping[str, Any]) -> bytes:
    """Encode a request: the command and its arguments."""
    return json.dumps({"verb": command, **arguments}).encode() + b"\n"


def reply_line(reply: Mapping[str, Any]) -> bytes:
    """Encode a reply."""
    return json.dumps(reply).encode() + b"\n"


def error_reply(message: str, remedy: str = "") -> dict[str, Any]:
    """Return the reply to a request that was refused."""
    return {"error": message, "remedy": remedy}

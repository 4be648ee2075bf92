"""Ask a running harvest over the Unix socket in its store.

The socket has mode 0600: whoever may write the store may control its run.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, FindingsError
from harvester.run.control.protocol import (
    MAX_REPLY_BYTES,
    request_line,
    socket_address,
)
from harvester.store import paths
from harvester.store.journal.lock import is_held, read_holder
from harvester.system.process_state import holder_remedy

PATIENCE_S = 5.0


def ask(
    store: Path, command: str, *, patience_s: float = PATIENCE_S, **arguments: Any
) -> dict[str, Any] | None:
    """Send a command; return the reply, or None when no run answers within `patience_s`.

    Raises:
        ConfigError: the run refuses the command.
    """
    try:
        with (
            socket_address(store) as path,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
        ):
            connection.settimeout(patience_s)
            connection.connect(path)
            connection.sendall(request_line(command, arguments))
            with connection.makefile("rb") as stream:
                reply = json.loads(stream.readline(MAX_REPLY_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(reply, dict):
        return None
    if reply.get("error"):
        raise ConfigError(str(reply["error"]), place=str(store), remedy=str(reply.get("remedy", "")))
    return reply


def tell(store: Path, command: str, **arguments: Any) -> dict[str, Any]:
    """Send a command as `ask` does, where a reply must come.

    Raises:
        FindingsError: no run holds this store, or the one that does is silent.
        ConfigError: the run refuses the command.
    """
    reply = ask(store, command, **arguments)
    if reply is not None:
        return reply
    if not is_held(store):
        raise FindingsError(
            "no run is active on this store", place=str(store), remedy="`harvester run` starts one"
        )
    holder: Mapping[str, Any] = read_holder(store / paths.LOCK)
    raise FindingsError(
        f"its job (pid {holder.get('pid', '?')} on {holder.get('host', '?')}) does not answer",
        place=str(store / paths.CONTROL_SOCKET),
        remedy=holder_remedy(holder, "`harvester status` shows whether it hangs; a signal may still end it"),
    )

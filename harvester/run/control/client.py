"""Ask a living job over the Unix socket in its store: one JSON line there, one JSON line back.

Standard library only, so that `harvester status` answers at once. The socket is 0600: whoever may write the
store may steer its job.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, FindingsError
from harvester.store import paths
from harvester.store.journal.lock import is_held, read_holder

LONGEST_ADDRESS = 100
"""sockaddr_un holds 108 bytes, with the closing NUL (unix(7))."""
LONGEST_LINE = 64 * 1024
"""Of a request. An answer is a whole status, complaints and all, from a job of our own."""
LONGEST_ANSWER = 16 * 1024 * 1024
PATIENCE_S = 5.0


@contextmanager
def address(store: Path) -> Iterator[str]:
    """A path of the socket that fits into a socket address, however deep the store lies."""
    path = str(store.resolve() / paths.CONTROL_SOCKET)
    if len(os.fsencode(path)) <= LONGEST_ADDRESS:
        yield path
        return
    folder = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{paths.CONTROL_SOCKET}"
    finally:
        os.close(folder)


def ask(store: Path, verb: str, *, patience_s: float = PATIENCE_S, **more: Any) -> dict[str, Any] | None:
    """What the job says, or None when nobody answers in time.

    Raises:
        ConfigError: the job refuses what was asked.
    """
    try:
        with address(store) as path, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(patience_s)
            line.connect(path)
            line.sendall(json.dumps({"verb": verb, **more}).encode() + b"\n")
            with line.makefile("rb") as answer:
                said = json.loads(answer.readline(LONGEST_ANSWER))
    except (OSError, ValueError):
        return None
    if not isinstance(said, dict):
        return None
    if said.get("error"):
        raise ConfigError(str(said["error"]), place=str(store), remedy=str(said.get("remedy", "")))
    return said


def tell(store: Path, verb: str, **more: Any) -> dict[str, Any]:
    """As `ask`, where an answer must come.

    Raises:
        FindingsError: no job holds this store, or the one that does is silent.
        ConfigError: the job refuses what was asked.
    """
    said = ask(store, verb, **more)
    if said is not None:
        return said
    if not is_held(store):
        raise FindingsError(
            "no job works on this store", place=str(store), remedy="`harvester run` starts one"
        )
    holder: Mapping[str, Any] = read_holder(store / paths.LOCK)
    raise FindingsError(
        f"its job (pid {holder.get('pid', '?')} on {holder.get('host', '?')}) does not answer",
        place=str(store / paths.CONTROL_SOCKET),
        remedy="`harvester status` tells a stopped process from a hung one; a signal may still end it",
    )

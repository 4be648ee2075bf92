"""Reserve a port for a test where nothing listens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def refusing_port() -> Iterator[int]:
    """Yield a port of 127.0.0.1 that refuses connections, and that no other process gets, during the block.

    The socket is bound and does not listen. A server of the test may listen there all the same: Linux allows
    a second bind where both sockets have SO_REUSEADDR and neither listens yet.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]

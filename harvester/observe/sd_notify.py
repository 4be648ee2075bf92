"""sd_notify(3) by the standard library: tells systemd that we are ready, what we do, and that we live.

Does nothing where no NOTIFY_SOCKET is set. A lost message is never an error: the work matters more.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class ServiceNotifier:
    """Messages to the service manager named by the environment.

    `WATCHDOG_USEC` (for `WATCHDOG_PID`, if set) is the time after which systemd takes silence for a hang.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # An abstract address is written with @ and meant with NUL (systemd.exec(5)).
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        wanted = environment.get("WATCHDOG_PID", "")
        meant = not wanted or wanted == str(os.getpid())
        usec = environment.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(usec) / 1e6 if meant and usec.isdigit() and int(usec) > 0 else None

    def ready(self) -> None:
        """The store is ours and the first request may leave."""
        self._send("READY=1")

    def beat(self, words: str) -> None:
        """What we do, in one line; and that the event loop turns."""
        self._send(f"STATUS={' '.join(words.split())}\nWATCHDOG=1")

    def stopping(self, extend_s: float) -> None:
        """We end; give us so much more time from now on."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(extend_s * 1e6)}\nWATCHDOG=1")

    def _send(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as line:
                line.setblocking(False)
                line.sendto(text.encode(), self._address)
        except OSError:
            return

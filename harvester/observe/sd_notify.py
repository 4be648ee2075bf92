"""Send readiness, status and watchdog messages to systemd, as sd_notify(3) does.

Without NOTIFY_SOCKET nothing is sent. A message that can't be sent is ignored: it must not end a run.
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
        """Report that the store is locked and requests may be sent."""
        self._send("READY=1")

    def beat(self, words: str) -> None:
        """Report one line of status, and that the event loop still runs."""
        self._send(f"STATUS={' '.join(words.split())}\nWATCHDOG=1")

    def stopping(self, extend_s: float) -> None:
        """Report that the process is ending, and ask for `extend_s` more seconds from now."""
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

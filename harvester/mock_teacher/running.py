"""Start a mock teacher in a thread or a process, and query or change it from tests."""

from __future__ import annotations

import asyncio
import http.client
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import orjson

from harvester.errors import HarvesterError
from harvester.mock_teacher.listening import MockServer
from harvester.mock_teacher.settings import MockSettings

_START_S = 30.0
_STOP_S = 10.0


class RunningMock:
    """A mock teacher that serves until `stop` or the end of the `with` block.

    All methods except `stop` use HTTP, so that they work for a thread and for a process. `pid` is None for a
    thread.
    """

    def __init__(
        self, base_url: str, stop: Callable[[], None], certificate: Path | None = None, pid: int | None = None
    ) -> None:
        self.base_url = base_url
        self.pid = pid
        self.is_stopped = False
        self._stop = stop
        self._certificate = certificate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and wait for its end; a second call does nothing."""
        self.is_stopped = True
        self._stop()

    def ledger(self, since: int = 0) -> dict[str, Any]:
        """Return `{"totals": {...}, "entries": [...]}`; see `ledger.LedgerCharge`."""
        values: dict[str, Any] = self._call("GET", f"/mock/ledger?since={since}")
        return values

    def totals(self) -> dict[str, int]:
        """Return the sums of the ledger; see `Ledger.totals`."""
        values: dict[str, int] = self._call("GET", "/mock/ledger?entries=0")["totals"]
        return values

    def state(self) -> dict[str, Any]:
        """Return counters of the server: received, admitted, statuses, in_flight, tasks, limits, faults."""
        values: dict[str, Any] = self._call("GET", "/mock/state")
        return values

    def fired(self) -> dict[str, int]:
        """Return how often each fault rule fired, by its name (`name`, else `POSITION:ACTION`)."""
        return {name: fault["fired"] for name, fault in self.state()["faults"].items()}

    def set_limits(self, **limits: float | bool | None) -> dict[str, Any]:
        """Change limits from now on: rpm, tpm, burst_s, hide, max_concurrency, concurrency_status."""
        values: dict[str, Any] = self._call("POST", "/mock/limits", limits)
        return values

    def set_faults(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the fault script. Its counters start again at 0; ordinals continue."""
        self._call("POST", "/mock/faults", [dict(row) for row in rows])

    def set_batches(self, **settings: float | bool | str | None) -> None:
        """Change settings of the batches from now on; see `settings.BatchSettings`."""
        self._call("POST", "/mock/batches", settings)

    def advance(self, seconds: float) -> None:
        """Let time pass on the clock of the batches."""
        self._call("POST", "/mock/clock", {"advance_s": seconds})

    def batches(self) -> dict[str, Any]:
        """Return `batches` as the API shows them, `served` calls by route, and `now` of their clock."""
        values: dict[str, Any] = self._call("GET", "/mock/batches")
        return values

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        url = urlsplit(self.base_url)
        assert url.hostname is not None
        if url.scheme == "https":
            trust = ssl.create_default_context(cafile=self._certificate)
            trust.check_hostname = False
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                url.hostname, url.port, timeout=_START_S, context=trust
            )
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=_START_S)
        try:
            connection.request(
                method, path, None if body is None else orjson.dumps(body), {"connection": "close"}
            )
            reply = connection.getresponse()
            content = orjson.loads(reply.read())
        finally:
            connection.close()
        if reply.status != 200:
            raise HarvesterError(content["error"]["message"], place=f"{url.netloc}{path}")
        return content


def start_in_thread(settings: MockSettings | None = None) -> RunningMock:
    """Start a mock teacher in a thread of this process and wait until it serves.

    Raises:
        ConfigError: as `serve`.
    """
    chosen = settings or MockSettings()
    ready = threading.Event()
    server = MockServer(chosen, lambda _: ready.set(), grace_s=0)
    thread = threading.Thread(target=lambda: asyncio.run(server.listen()), name="mock-teacher", daemon=True)
    thread.start()
    if not ready.wait(_START_S):
        raise HarvesterError("the mock teacher did not start", place=server.base_url)

    def stop() -> None:
        if thread.is_alive():
            server.leave()
            thread.join(_STOP_S)

    return RunningMock(server.base_url, stop, chosen.certificate)


def start_process(*flags: str) -> RunningMock:
    """Start `python -m harvester.mock_teacher FLAGS` (`--port 0` unless given) and wait until it serves.

    Raises:
        HarvesterError: it ended without serving; the message is what it said.
    """
    command = [sys.executable, "-m", "harvester.mock_teacher", "--json", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    first = process.stdout.readline()
    if not first:
        message = process.stderr.read().decode(errors="replace").strip()
        process.stdout.close()
        process.stderr.close()
        process.wait(_STOP_S)
        raise HarvesterError(f"the mock teacher did not start: {message}", place="harvester.mock_teacher")

    def stop() -> None:
        if process.poll() is None:
            process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        except ValueError:  # its pipes are closed: stopped before
            process.wait()

    return RunningMock(orjson.loads(first)["base_url"], stop, pid=process.pid)

"""Start commands of the package as processes of their own, forked from `tests.command_server`."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


class _Server:
    """The server of this test process. It ends with it, as its stdin closes then."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commands-")
        self.path = f"{self._folder.name}/socket"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.command_server", self.path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n", "the command server did not start"
        atexit.register(self._stop)

    def _stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


@cache
def _server() -> _Server:
    return _Server()


def program(module: str) -> list[str]:
    """Return the words with which another program starts `python -m module` as a fork of the server."""
    return [sys.executable, "-IS", str(ROOT / "tests" / "fork_client.py"), _server().path, module]


class Command:
    """A command under way: the part of `subprocess.Popen` that tests use, with text streams."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        stdout: Any = subprocess.PIPE,
        stderr: Any = subprocess.PIPE,
        environment: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
    ) -> None:
        if environment and "LD_PRELOAD" in environment:
            raise ValueError("the loader reads LD_PRELOAD when an interpreter starts: use `subprocess`")
        self.args = [module, *map(str, arguments)]
        self.returncode: int | None = None
        self.stdout, out = _opened(stdout)
        self.stderr, err = _opened(stderr)
        null = os.open(os.devnull, os.O_RDONLY)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server().path)
        request = {
            "module": module,
            "arguments": self.args[1:],
            "environment": {**os.environ, **(environment or {})},
            "cwd": str(cwd or Path.cwd()),
        }
        text = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [text], [null, out, err])
        self._connection.sendall(text[sent:])
        for descriptor, given in ((null, None), (out, stdout), (err, stderr)):
            if given in (None, subprocess.PIPE):
                os.close(descriptor)
        self._messages = self._connection.makefile("r")
        self.pid: int = json.loads(self._messages.readline())["pid"]

    def poll(self) -> int | None:
        """Return the exit status if the process has ended: negative where a signal ended it."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._read_status()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: the process has not ended after `timeout` seconds.
        """
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._read_status()
        assert self.returncode is not None
        return self.returncode

    def _read_status(self) -> None:
        self.returncode = json.loads(self._messages.readline())["status"]
        self._messages.close()
        self._connection.close()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their ends and wait for the process; see `wait` for the error."""
        ends = time.monotonic() + timeout if timeout is not None else None
        texts: dict[str, str] = {"stdout": "", "stderr": ""}

        def read(name: str, stream: IO[str]) -> None:
            texts[name] = stream.read()
            stream.close()

        readers = [
            threading.Thread(target=read, args=(name, stream), daemon=True)
            for name, stream in (("stdout", self.stdout), ("stderr", self.stderr))
            if stream is not None and not stream.closed
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if ends is None else max(0.0, ends - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if ends is None else max(0.0, ends - time.monotonic()))
        return texts["stdout"], texts["stderr"]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _opened(wanted: Any) -> tuple[IO[str] | None, int]:
    """Return the stream to read from, if the caller wants one, and the descriptor for the process.

    `None` means our own stderr, a number or a file that descriptor itself, as with `subprocess.Popen`.
    """
    if wanted == subprocess.PIPE:
        readable, writable = os.pipe()
        return os.fdopen(readable, encoding="utf-8"), writable
    if wanted is None:
        return None, os.dup(2)
    return None, wanted if isinstance(wanted, int) else wanted.fileno()


def run(
    module: str,
    arguments: Sequence[object],
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` to its end and return its output.

    Raises:
        subprocess.TimeoutExpired: it did not end within `timeout` seconds; it was killed.
    """
    command = Command(module, arguments, environment=environment, cwd=cwd)
    try:
        out, err = command.communicate(timeout)
    except subprocess.TimeoutExpired:
        command.kill()
        command.communicate()
        raise
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.args, command.returncode, out, err)

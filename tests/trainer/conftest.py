"""Share what many tests of the trainer need: a finished training, and a warm process that forks others."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from tests import commands
from tests.trainer import tiny
from trainer import config as settings
from trainer.training.train import Trained, train

# Commands of the trainer that run the harvester.
HARVESTING = frozenset({"curve", "distil", "evaluate", "loop", "onpolicy"})

ForkServer = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> tuple[settings.TrainConfig, Trained]:
    """A finished training of 40 rows, 10 held out. Look, don't touch."""
    folder = tmp_path_factory.mktemp("learned")
    path = tiny.train_toml(folder, tiny.skill(40, held_out=10), train={"epochs": 12, "log_every": 1})
    config = settings.load(path)
    return config, train(config)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """`fork_server(what, **told)` -> how a fresh process ended that did it; see `fork_server.py`."""
    path = _socket_path()
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stream = _connected(path)
        if stream is None:
            subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "tests.trainer.fork_server", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
            )
            stream = _connected(path)
    assert stream is not None

    with _asking(stream) as ask:
        yield ask
    path.with_suffix(".lock").unlink(missing_ok=True)


@pytest.fixture
def fork_connection(fork_server: ForkServer) -> Callable[[], AbstractContextManager[ForkServer]]:
    """`with fork_connection() as ask:` is another `fork_server`, for a thread that waits beside others."""
    path = _socket_path()

    @contextmanager
    def connect() -> Iterator[ForkServer]:
        stream = _connected(path)
        assert stream is not None, "the server is alive as long as `fork_server` is"

        with _asking(stream) as ask:
            yield ask

    return connect


@contextmanager
def _asking(stream: IO[str]) -> Iterator[ForkServer]:
    """Ask the server at the other end of a stream, one command after the other."""

    def ask(what: str, **command: Any) -> dict[str, Any]:
        if command.get("words", [""])[0] in HARVESTING:
            command["harvester"] = commands.program("harvester")
        stream.write(json.dumps({"what": what, **command}, default=str) + "\n")
        stream.flush()
        return json.loads(stream.readline())

    with stream:
        yield ask


def _socket_path() -> Path:
    """Return where the fork server of this test session listens."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    return Path(tempfile.gettempdir()) / f"trainer-{session}.socket"


def _connected(path: Path) -> IO[str] | None:
    """Return a stream to the server that listens there, if one does and is not about to end."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        stream = connection.makefile("rw", encoding="utf-8")
    try:
        is_ready = stream.readline() == "ready\n"
    except ConnectionResetError:
        is_ready = False
    if is_ready:
        return stream
    stream.close()
    return None
